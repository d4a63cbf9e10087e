"""What this environment's engine does with layers in between is what it does with those shown."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.loader_trace import LoaderTrace, trace_loader
from engine_plugins.weights.loader.loader_watch import TracedCopy, WatchedCopies, following
from tests.support.loader_maps import PlayedEngine, logical, played_engine
from tests.support.megatron_fixtures import MegatronCase, megatron_cases

pytestmark = pytest.mark.loader

LAYERS = 8
COMMITTED = Path(__file__).parents[2] / "fixtures" / "megatron"
CASES = {
    case.config["model_type"] + ("_odd" if "oddvocab" in case.name else ""): case
    for case in megatron_cases(COMMITTED)
}
_NUMBER = re.compile(r"model\.layers\.(\d+)\.")


@pytest.fixture(scope="module")
def engine() -> Iterator[PlayedEngine]:
    with played_engine() as engine:
        yield engine


def lengthened(case: MegatronCase, folder: Path) -> list[LogicalTensor]:
    """The tensors of a case's model, its last layer repeated up to `LAYERS`; its config beside."""
    last = case.config["num_hidden_layers"] - 1
    config = case.config | {"num_hidden_layers": LAYERS}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1] * LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    tensors: list[LogicalTensor] = []
    for each in logical(case.expected()):
        found = _NUMBER.match(each.name)
        number = int(found[1]) if found else -1
        there = [number] if number < last else range(last, LAYERS)
        if number > last:  # a layer that predicts further tokens stays behind the others
            there = [number - last - 1 + LAYERS]
        names = (_NUMBER.sub(f"model.layers.{other}.", each.name) for other in there)
        tensors += (LogicalTensor(name=n, shape=each.shape, dtype=each.dtype) for n in names)
    return sorted(tensors, key=lambda each: _place(each.name))


def _place(name: str) -> tuple[int, str]:
    found = _NUMBER.match(name)
    return (int(found[1]) if found else LAYERS + ("embed" not in name) * 2 - 1, name)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("kind", CASES)
def test_layers_that_were_not_shown_have_the_copies_that_the_loader_makes(
    engine: PlayedEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tp_size: int,
) -> None:
    """Beside a run of the same loader that is handed every tensor, and followed."""
    tensors = lengthened(CASES[kind], tmp_path)
    shown: list[str] = []
    whole: list[TracedCopy] = []

    def both(
        parameters: dict[str, torch.Tensor],
        load: Callable[[Iterable[Any]], object],
        tensors: list[LogicalTensor],
        **options: bool,
    ) -> LoaderTrace:
        whole[:] = _every_copy(parameters, load, tensors)

        def noting(weights: Iterable[Any]) -> object:
            handed = list(weights)
            shown[:] = [name for name, _ in handed]
            return load(iter(handed))

        return trace_loader(parameters, noting, tensors, **options)

    with engine.rank(tmp_path, tp_size=tp_size, tp_rank=tp_size - 1) as rank:
        monkeypatch.setattr(sys.modules[type(rank.rules).__module__], "trace_loader", both)
        trace = rank.trace(tensors)
    assert trace.covered_numel() == trace.parameter_numel
    assert len(shown) < len(tensors)
    assert set(trace.copies) == set(whole)
    assert trace.modules() == LoaderTrace(copies=tuple(whole), parameter_numel={}).modules()


def _every_copy(
    parameters: dict[str, torch.Tensor],
    load: Callable[[Iterable[Any]], object],
    tensors: list[LogicalTensor],
) -> list[TracedCopy]:
    copies = WatchedCopies(parameters)
    feed = [(t.name, torch.empty(t.shape, dtype=t.dtype, device="meta")) for t in tensors]
    for name, placeholder in feed:
        copies.add_source(name, placeholder)
    with torch.no_grad(), following(copies):
        load(iter(feed))
    return copies.copies
