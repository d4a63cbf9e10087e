r"""What Megatron-Bridge's own mappings make of shards that real jobs wrote; run where Bridge is.

    .venv/megatron/bin/python -m tests.support.bridge_mappings

Prints as JSON, for every case, what became of it by Bridge's mapping alone: "same" where the HF
tensors are rebuilt bit for bit, and every rule is what our tables have; "unknown" where Bridge does
not know the family; else the error. And for every model that Bridge knows, the mapping classes that
are not followed.
"""

from __future__ import annotations

import json
import os
from typing import Any
from unittest.mock import patch

import torch

from engine_plugins.errors import EnginePluginError
from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.megatron import names
from engine_plugins.weights.sources.megatron.bridge import bridge_family
from engine_plugins.weights.sources.megatron.families import Family
from engine_plugins.weights.sources.megatron.rank import strip_wrappers
from engine_plugins.weights.sources.megatron.source import megatron_boxes
from tests.benchmarks.transformer_engine_stand_in import install
from tests.support.megatron_fixtures import MegatronCase, fixture_folders, megatron_cases


def main() -> None:
    """Judge every case, then list every bridge."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    install()
    import megatron.bridge  # noqa: F401

    cases = [case for folder in fixture_folders() for case in megatron_cases(folder)]
    told = {case.name: _judged(case) for case in cases}
    print(json.dumps({"cases": told, "models": _models()}), flush=True)


def _judged(case: MegatronCase) -> str:
    family = bridge_family(case.config)
    if family is None:
        return "unknown"
    ours = names.MegatronNames(case.config)
    try:
        found, theirs = _rebuilt(case, family)
    except EnginePluginError as error:
        return f"{type(error).__name__}: {error.message}"
    expected = case.expected()
    wrong = [
        name
        for name, tensor in expected.items()
        if name not in found or not torch.equal(found[name], tensor)
    ]
    return f"differs in {wrong[:3]}" if wrong else _compared(case, ours, theirs)


def _rebuilt(
    case: MegatronCase, family: Family
) -> tuple[dict[str, torch.Tensor], names.MegatronNames]:
    """The HF tensors by Bridge's mapping, our tables out of the way."""
    with patch(f"{names.__name__}.registered_family", lambda model_type: None):
        boxes = [box for rank in case.ranks() for box in megatron_boxes(rank, case.config)]
        return assemble(boxes), names.MegatronNames(case.config)


def _compared(case: MegatronCase, ours: names.MegatronNames, theirs: names.MegatronNames) -> str:
    for rank in case.ranks():
        for chunk in rank.chunks:
            for given, kind in chunk.classes.items():
                native = strip_wrappers(given)
                if native.endswith("_extra_state"):
                    continue
                mine, bridges = (
                    names.classified(native, by.find(native, rank, chunk.global_layers), rank, kind)
                    for by in (ours, theirs)
                )
                if (mine.hf, mine.rows) != (bridges.hf, bridges.rows) or (
                    mine.role and mine.role.cut
                ) is not (bridges.role and bridges.role.cut):
                    return f"{native}: {mine} here, {bridges} there"
    return "same"


def _models() -> dict[str, list[str]]:
    """Every architecture that Bridge knows, and the mapping classes that are not followed."""
    from megatron.bridge.models.conversion.model_bridge import get_model_bridge

    told: dict[str, list[str]] = {}
    for kind in get_model_bridge._exact_types:
        name: Any = getattr(kind, "__name__", kind)
        try:
            family = bridge_family({"architectures": [name]})
        except EnginePluginError as error:
            told[name] = [error.message]
        else:
            told[name] = sorted(set(family.refused.values())) if family else ["unknown"]
    return told


if __name__ == "__main__":
    main()
