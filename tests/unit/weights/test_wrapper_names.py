"""Names that wrappers have changed, and names that only look like a model's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from engine_plugins.errors import SourceError
from engine_plugins.weights.sources.wrapper_names import (
    named_alike,
    plain_name,
    refuse_adapters,
    unwrapped,
    without_peft,
)

BASE = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "name",
    [
        f"_orig_mod.{BASE}",
        BASE.replace("layers.0", "layers.0._checkpoint_wrapped_module"),
        BASE.replace("layers.0", "layers.0._orig_mod._checkpoint_wrapped_module"),
    ],
)
def test_a_wrapper_leaves_no_trace(name: str) -> None:
    assert plain_name(name) == BASE


def test_ddps_prefix_goes_only_where_every_name_has_it() -> None:
    both = [(f"_orig_mod.module.{BASE}", 1), ("_orig_mod.module.lm_head.weight", 2)]
    assert dict(named_alike(both)) == {BASE: 1, "lm_head.weight": 2}
    one = [(f"module.{BASE}", 1), ("lm_head.weight", 2)]
    assert dict(named_alike(one)) == dict(one)


def test_the_module_inside_is_found_however_it_is_wrapped() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrapped = torch.compile(nn.DataParallel(checkpoint_wrapper(inner)))
    assert isinstance(wrapped, nn.Module)
    assert unwrapped(wrapped) is inner
    assert unwrapped(inner) is inner


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model." + BASE.replace("weight", "base_layer.weight"),
        "base_model.model." + BASE.replace("weight", "lora_A.default.weight"),
        BASE.replace("weight", "lora_B.default.weight"),
        "base_model.model.lm_head.modules_to_save.default.weight",
    ],
)
def test_adapters_are_refused_with_how_to_merge(name: str) -> None:
    with pytest.raises(SourceError, match="adapters") as raised:
        refuse_adapters([BASE, name])
    assert name in str(raised.value)
    assert "merge_lora=True" in raised.value.remedy


def test_plain_names_are_no_adapters() -> None:
    refuse_adapters([BASE, "lm_head.weight"])
    assert without_peft("base_model.model." + BASE.replace("weight", "base_layer.weight")) == BASE
