"""Options of a Megatron model under which its parameters are not what their names say.

Name, class and shape of a parameter stay the same while its rows lie in another order, or its
values mean something else. Nothing then fails: the engine would serve permuted weights. So the
options that do this are refused, and so is every option that is unknown here and whose name
speaks of a layout, once it is set. Source: all fields of the configs of megatron-core 0.16.1 and
of its main branch in August 2026.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from engine_plugins.errors import SourceError, UnsupportedError

__all__ = ["check_norms", "check_options", "glu_interleave"]

_EXPERTS = "moe_mlp_glu_interleave_size"
"""Rows of the blocks in which grouped experts keep gate and up by turns; it is followed."""

_ZERO_CENTERED = "layernorm_zero_centered_gamma"
"""Norms hold their weight less one."""

_REFUSED = {
    "rotary_interleaved": "query and key rows are in the order of another rotary embedding",
    "moe_shared_expert_glu_interleave_size": "shared experts keep gate and up rows by turns",
    "moe_single_grouped_weight": "all experts of a rank are one parameter",
    "moe_single_grouped_bias": "all experts of a rank are one parameter",
    "mla_down_proj_fusion": "two down-projections are one parameter",
    "use_grouped_gemm_for_dense_mlp": "dense gate and up rows may lie by turns",
    "gtp_weight_remat_size": "a weight is cut over further ranks",
    "expert_gtp_weight_remat_size": "an expert's weight is cut over further ranks",
}
"""What each option does to the parameters."""

_HINT = re.compile(
    r"interleav|glu|transpos|swizzl|permut|pack|layout|shuffl|reorder|(?<!quan)tile|stack|concat"
    r"|zero_centered|(weight|row)_(order|format)"
)
_HARMLESS = frozenset(
    {
        "bias_swiglu_fusion",
        "deepstack_visual_indexes",
        "disable_parameter_transpose_cache",
        "dsa_indexer_rope_interleaved",  # of an attention that none of our families has
        "glu_linear_offset",
        "interleaved_attn_pattern",
        _ZERO_CENTERED,  # of some families this is HF's own form: `check_norms`
        "mamba_stack_spec",
        "moe_hybridep_num_blocks_permute",
        "moe_hybridep_num_blocks_unpermute",
        "moe_permute_fusion",
        "moe_permute_fusion_into_hybridep",
        "pipeline_model_parallel_layout",  # layers are placed by their own numbers
        "swiglu",
    }
)
"""Known options that sound like a layout of parameters and are none."""


def check_options(chunk: nn.Module) -> None:
    """Refuse a model chunk whose config changes the layout in a way that is not followed here.

    Args:
        chunk: looked at with every module in it, because a wrapper may have no config and a part
            of the model may have one of its own.

    Raises:
        UnsupportedError: names the option and its value.
    """
    for config in _configs(chunk):
        for name, value in _options(config).items():
            what = _REFUSED.get(name) or _suspicion(name)
            if what is None or not _is_set(config, name, value):
                continue
            raise UnsupportedError(
                f"the Megatron model's config has {name} = {value!r}: {what}",
                remedy="train without it; or export HF-named tensors (Megatron-Bridge does) and "
                "publish those with WeightSender.from_hf",
            )


def check_norms(chunk: nn.Module, *, zero_centered: bool | None) -> None:
    """Refuse norms that do not hold what the HF norms of the family hold.

    Args:
        chunk: with the configs of all its parts.
        zero_centered: whether HF's norms hold their weight less one; None: as the trainer's.

    Raises:
        UnsupportedError: names the option and its value.
    """
    for config in _configs(chunk):
        said = _options(config).get(_ZERO_CENTERED)
        if zero_centered is None or said is None or bool(said) is zero_centered:
            continue
        held = ["their weight", "their weight less one"]
        raise UnsupportedError(
            f"the Megatron model's config has {_ZERO_CENTERED} = {said!r}: its norms hold "
            f"{held[not zero_centered]}, and the HF model's {held[zero_centered]}",
            remedy=f"train with {_ZERO_CENTERED} = {zero_centered}; for a family of your own say "
            "zero_centered_norms in register_family",
        )


def glu_interleave(chunk: nn.Module) -> int | None:
    """The rows of a block in which the chunk's grouped experts keep gate and up by turns.

    Returns:
        None where each rank holds all of its gate before all of its up.

    Raises:
        SourceError: parts of the chunk that say different sizes.
    """
    given = {_options(config).get(_EXPERTS) for config in _configs(chunk)} - {None, 0}
    if len(given) > 1:
        raise SourceError(
            f"parts of one chunk have {_EXPERTS} = {sorted(map(str, given))}",
            remedy="give all of them one size",
        )
    return next(iter(given), None)


def _configs(chunk: nn.Module) -> Iterator[object]:
    """Each config object that the chunk or a module in it has, once."""
    seen: set[int] = set()
    for module in chunk.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config


def _options(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    known = {name: getattr(config, name, None) for name in (*_REFUSED, _EXPERTS, _ZERO_CENTERED)}
    return known | getattr(config, "__dict__", {})


def _suspicion(name: str) -> str | None:
    """What to say of an option that nobody has read, if its name speaks of a layout."""
    # A packed sequence is of tokens, not of parameters.
    if name == _EXPERTS or name in _HARMLESS or "seq" in name or not _HINT.search(name):
        return None
    return "an option that is not known here, and may change the order of a parameter's rows"


def _is_set(config: object, name: str, value: object) -> bool:
    if not value or callable(value) or (name.endswith("_remat_size") and value == 1):
        return False
    return name in _REFUSED or value != _default(config, name)


def _default(config: object, name: str) -> object:
    """What a dataclass gives the option by itself; elsewhere nothing is known to be a default."""
    if not dataclasses.is_dataclass(config):
        return None
    for field in dataclasses.fields(config):
        if field.name == name:
            return field.default
    return None
