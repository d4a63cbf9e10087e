"""Models that tests have an engine serve or prepare have sizes that every CPU's kernels take.

An engine chooses kernels by the CPU; a model that one machine serves may not start on another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cpu_features import FLAGS, cpu_line
from tests.support.cpu_sizes import unfit_sizes
from tests.support.drafting_heads import HeadedModel
from tests.support.drafting_models import drafting_model, save_model
from tests.support.gate_models import GateModel
from tests.support.live_models import LIVE
from tests.support.megatron_fixtures import megatron_cases
from tests.support.sized_models import sized_qwen3

COMMITTED = LIVE.parent / "megatron"
LATENT = {
    case.config["model_type"]: case
    for case in megatron_cases(COMMITTED)
    if case.config.get("kv_lora_rank")
}


def of_folder(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("name", sorted(path.name for path in (LIVE / "hf").iterdir()))
def test_live_models(name: str) -> None:
    """At TP 1 and 2."""
    for tp_size in (1, 2):
        assert unfit_sizes(of_folder(LIVE / "hf" / name), tp_size=tp_size) == {}


def test_models_made_by_tests_and_the_demo(tmp_path: Path) -> None:
    example = import_module("examples.tiny_model")
    with torch.device("meta"):  # its sizes alone
        sized = sized_qwen3()
    headed, head = HeadedModel(0, right=True).save(tmp_path / "headed")
    drafting = of_folder(save_model(tmp_path / "drafting", drafting_model(0)))
    made: dict[str, Mapping[str, Any]] = {
        "drafting": drafting,
        "drafted for": of_folder(headed),
        "head": of_folder(head),
        "gate": of_folder(GateModel(vocab=64).copy_to(tmp_path / "gate")),
        "gate, experts": of_folder(GateModel(moe=True, vocab=64).copy_to(tmp_path / "experts")),
        "sized": sized.config.to_dict(),
        "demo": example.tiny_qwen3(example.character_tokenizer()).config.to_dict(),
    }
    assert {name: sizes for name, each in made.items() if (sizes := unfit_sizes(each))} == {}


def test_latent_attention_of_the_fixtures() -> None:
    """The one model whose loading packs what it has, whole tiles or not."""
    assert {name: unfit_sizes(case.config) for name, case in LATENT.items()} == {"deepseek_v3": {}}
    given = {**LATENT["deepseek_v3"].config, "kv_lora_rank": 24, "qk_nope_head_dim": 16}
    assert unfit_sizes(given) == {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "cached": 56}


def test_the_header_says_what_this_cpu_has_and_lacks(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "model name\t: A CPU\nflags\t\t: fpu avx2 amx_tile\n\nmodel name\t: another\n"
    )
    line = cpu_line(cpuinfo)
    assert line.startswith("A CPU, ")
    assert "; has avx2 amx_tile; lacks avx512f" in line
    assert all(f" {flag}" in cpu_line() for flag in FLAGS)
    assert "of an unknown kind" in cpu_line(tmp_path / "absent")
