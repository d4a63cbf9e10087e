"""vLLM's latent attention where the CPU has AMX: which models load, and which can be updated.

Run on a CPU without AMX, these show the way that vLLM goes there, see `tests.support.amx`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine_plugins.errors import UnsupportedError
from tests.support.amx import amx_for_vllm
from tests.support.loader_maps import PlayedEngine, played_engine, receiving, same_bits, update
from tests.support.megatron_fixtures import megatron_cases
from tests.support.source_ranks import offered_tensors
from vllm_ext.weight_installer import VllmWeightInstaller

COMMITTED = Path(__file__).parents[2] / "fixtures" / "megatron"
CASE = next(case for case in megatron_cases(COMMITTED) if case.config.get("kv_lora_rank"))
"""Of whole tiles, as every model of the tests that vLLM prepares for serving."""


@pytest.fixture(scope="module")
def engine() -> Iterator[PlayedEngine]:
    with played_engine() as engine, amx_for_vllm():
        yield engine


@contextmanager
def loaded(
    engine: PlayedEngine, folder: Path, dtype: str, config: dict[str, Any]
) -> Iterator[tuple[nn.Module, VllmWeightInstaller]]:
    """A rank's model of such a config, loaded and ready to serve, and its installer."""
    (folder / "config.json").write_text(json.dumps(config))
    with engine.rank(folder, tp_size=1, tp_rank=0, dtype=dtype) as rank:
        model = rank.model()
        installer = rank.installer(model)
        assert isinstance(installer, VllmWeightInstaller)
        yield model, installer


def test_an_update_is_refused_before_anything_is_touched(
    engine: PlayedEngine, tmp_path: Path
) -> None:
    """VLLM empties what its reload would make the packed copies from: it failed half way."""
    values = {name: tensor.bfloat16() for name, tensor in CASE.expected().items()}
    with (
        loaded(engine, tmp_path, "bfloat16", CASE.config) as (model, installer),
        offered_tensors(values) as trainer,
        receiving(installer) as receiver,
    ):
        attention: list[Any] = [
            each for each in model.modules() if getattr(each, "is_amx_bmm_enabled", False)
        ]
        assert len(attention) == CASE.config["num_hidden_layers"]
        assert all(each.kv_b_proj.weight.numel() == 0 for each in attention)
        before = [each.impl._w_uk_packed.clone() for each in attention]
        with pytest.raises(UnsupportedError, match="with AMX") as caught:
            update(receiver, [trainer])
        assert "--attention-backend CPU_MLA" in caught.value.remedy
        for each, packed in zip(attention, before, strict=True):
            assert same_bits(each.impl._w_uk_packed, packed)  # of memory as it came: NaNs too


def test_with_the_plain_attention_an_update_goes_through(
    engine: PlayedEngine, tmp_path: Path
) -> None:
    """What the refusal advises: of any sizes, here in float32, which AMX does not take at all."""
    values = {name: tensor.clone() for name, tensor in CASE.expected().items()}
    with (
        loaded(engine, tmp_path, "float32", CASE.config) as (model, installer),
        offered_tensors(values) as trainer,
        receiving(installer) as receiver,
    ):
        update(receiver, [trainer])
        name = "model.layers.0.self_attn.kv_b_proj.weight"
        assert torch.equal(model.get_parameter(name), values[name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_lora_rank": 24}, "invalid weight out features 24"),
        ({"qk_nope_head_dim": 16}, "invalid weight input features 16"),
        ({"v_head_dim": 24}, "invalid weight out features 24"),
    ],
)
def test_amx_takes_whole_tiles_alone(
    engine: PlayedEngine, tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    """Before an update, when vLLM loads the model: such a model cannot be served there."""
    with (
        pytest.raises(RuntimeError, match=said),
        loaded(engine, tmp_path, "bfloat16", {**CASE.config, **changes}),
    ):
        pass
