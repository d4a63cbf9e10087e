"""Options of a Megatron model that change what lies where in its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.sources.megatron.config import (
    check_norms,
    check_options,
    glu_interleave,
)


def chunk_with(config: object, *, inside: bool = False) -> nn.Module:
    """A wrapped model whose config is at the outermost or at the innermost module."""
    inner = nn.Linear(1, 1)
    chunk = nn.Sequential(nn.Sequential(inner))
    (inner if inside else chunk).config = config  # type: ignore[assignment]
    return chunk


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("moe_shared_expert_glu_interleave_size", 32),
        ("rotary_interleaved", True),
        ("gtp_weight_remat_size", 2),
        ("use_grouped_gemm_for_dense_mlp", True),
        ("dense_gate_up_interleave", 16),
        ("qkv_weight_layout", "sbh3d"),
        ("transpose_experts", True),
        ("swizzled_weights", 1),
    ],
)
def test_a_layout_option_is_refused_by_name_and_value(
    option: str, value: object, inside: bool
) -> None:
    """Known ones, and those that nobody has heard of here."""
    with pytest.raises(UnsupportedError, match=f"{option} = {value!r}"):
        check_options(chunk_with(SimpleNamespace(**{option: value}), inside=inside))


@pytest.mark.parametrize(
    "options",
    [
        {"moe_shared_expert_glu_interleave_size": None, "rotary_interleaved": False},
        {"gtp_weight_remat_size": 1, "qkv_weight_layout": ""},
        {"moe_permute_fusion": True, "pipeline_model_parallel_layout": "Et*4|L"},
        {"packed_sequences": True, "moe_router_quantile_balancing_ema": 0.9},
        {"gated_linear_unit": True, "glu_activation": max},
    ],
)
def test_what_is_unset_or_known_to_be_harmless_is_accepted(options: dict[str, Any]) -> None:
    check_options(chunk_with(SimpleNamespace(**options)))


def test_a_default_of_an_unknown_option_is_not_set() -> None:
    @dataclass
    class Config:
        gate_layout: str = "plain"
        row_stacks: int = 1
        parts: list[str] = field(default_factory=list)

    check_options(chunk_with(Config()))
    with pytest.raises(UnsupportedError, match="gate_layout = 'turns'"):
        check_options(chunk_with(Config(gate_layout="turns")))


def test_the_experts_interleaving_is_told_and_must_be_one() -> None:
    config = SimpleNamespace(moe_mlp_glu_interleave_size=32)
    chunk = chunk_with(config, inside=True)
    check_options(chunk)
    assert glu_interleave(chunk) == 32
    assert glu_interleave(chunk_with(SimpleNamespace())) is None
    chunk.config = SimpleNamespace(moe_mlp_glu_interleave_size=16)  # type: ignore[assignment]
    with pytest.raises(SourceError, match=r"\['16', '32'\]"):
        glu_interleave(chunk)


@pytest.mark.parametrize("said", [True, False])
def test_norms_must_hold_what_the_families_do(said: bool) -> None:
    """Gemma's norms hold their weight less one, and so does Megatron with the option."""
    chunk = chunk_with(SimpleNamespace(layernorm_zero_centered_gamma=said), inside=True)
    check_options(chunk)
    check_norms(chunk, zero_centered=said)
    check_norms(chunk, zero_centered=None)
    with pytest.raises(UnsupportedError, match=f"layernorm_zero_centered_gamma = {said}") as told:
        check_norms(chunk, zero_centered=not said)
    assert f"layernorm_zero_centered_gamma = {not said}" in told.value.remedy
