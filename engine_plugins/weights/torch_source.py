"""The trainer's plain torch tensors as a source: whole HF-named tensors are one box each.

`transformers` >= 5 keeps a layer's experts fused in memory while checkpoints and engines
speak of one tensor per expert; those are split here, as views.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.placement import SourceBox

__all__ = ["hf_boxes", "plain_view", "split_fused_experts"]

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


def hf_boxes(named_tensors: NamedTensors, *, model_type: str | None = None) -> list[SourceBox]:
    """Describe HF-named tensors as a source, without copying any.

    Two names over the same memory (a tied head in a state dict) are both published: which
    of them the engine has is the engine's to say.

    Args:
        named_tensors: `model.state_dict()` or `model.named_parameters()`. Any strides.
        model_type: of the HF config; says how fused experts are split. See
            `split_fused_experts`.

    Raises:
        SourceError: a name twice, or a tensor whose memory is not its values.
        UnsupportedError: a tensor that is no plain strided memory (DTensor, sparse).
    """
    views: dict[str, torch.Tensor] = {}
    for name, tensor in _pairs(named_tensors):
        if name in views:
            raise SourceError(
                f"{name}: given twice", remedy="give each HF tensor once, under one name"
            )
        views[name] = plain_view(name, tensor)
    boxes: dict[str, SourceBox] = {}
    for name, view in split_fused_experts(views, model_type=model_type):
        if name in boxes:
            raise SourceError(
                f"{name}: given on its own and inside a fused experts tensor",
                remedy="give each expert once",
            )
        shape = tuple(view.shape)
        boxes[name] = SourceBox(name=name, global_shape=shape, start=(0,) * len(shape), data=view)
    return list(boxes.values())


def plain_view(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's memory as a plain view outside autograd.

    Raises:
        SourceError: not a tensor, or no memory of its own behind each element.
        UnsupportedError: a dtype or tensor class that cannot be moved as bytes.
    """
    if not isinstance(tensor, torch.Tensor):
        raise SourceError(
            f"{name}: a {type(tensor).__name__} is not a tensor", remedy="give torch tensors"
        )
    _refuse_wrapped(name, tensor)
    if tensor.device.type == "meta":
        raise SourceError(
            f"{name}: a meta tensor has no values", remedy="materialise the model first"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        raise UnsupportedError(
            f"{name}: a {tensor.layout} tensor of {tensor.dtype} cannot be sent",
            remedy="give a dense tensor of a real, unquantized dtype",
        )
    _refuse_shared(name, tensor)
    return tensor.detach().as_subclass(torch.Tensor)


def _refuse_wrapped(name: str, tensor: torch.Tensor) -> None:
    """Refuse classes that keep their values elsewhere than in the tensor's own memory."""
    if torch.nn.parameter.is_lazy(tensor):
        raise SourceError(
            f"{name}: an uninitialized parameter has no values",
            remedy="run one forward pass first",
        )
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        raise UnsupportedError(
            f"{name}: a DTensor (FSDP2, tensor parallel) is one rank's share; reading its "
            "placements comes with a later release",
            remedy="gather into a plain tensor that you keep and refill before every update",
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise UnsupportedError(
            f"{name}: a {type(tensor).__name__} keeps its values outside its own memory",
            remedy="give plain torch tensors (dequantized, if it is a quantized class)",
        )


def _refuse_shared(name: str, tensor: torch.Tensor) -> None:
    """Refuse memory that does not hold each element's value by itself."""
    if tensor.is_conj() or tensor.is_neg():
        raise SourceError(
            f"{name}: a lazily conjugated or negated view's memory is not its values",
            remedy="give tensor.resolve_conj().resolve_neg(), and keep it alive",
        )
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        raise SourceError(
            f"{name}: its storage has been freed (an FSDP1 parameter outside of summoning?)",
            remedy="publish while the full parameters are in memory",
        )
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    if tensor.numel() and any(stride == 0 and extent > 1 for extent, stride in sizes):
        raise SourceError(
            f"{name}: an expanded tensor (strides {tensor.stride()}) has several elements in "
            "one place",
            remedy="give the tensor before expand(), or a contiguous copy",
        )


@dataclass(frozen=True, kw_only=True)
class _ExpertStyle:
    """How a family's fused experts in memory are named in its checkpoints.

    Attributes:
        model_types: HF families that are saved so.
        parts: fused leaf -> the per-expert leaves that its rows (axis 1) hold, in order.
    """

    model_types: frozenset[str]
    parts: Mapping[str, tuple[str, ...]]


# transformers' conversion mapping "qwen2_moe": gate_up_proj [experts, 2 x ffn, hidden] and
# down_proj [experts, hidden, ffn] are one checkpoint tensor per expert and projection.
_EXPERT_STYLE = _ExpertStyle(
    model_types=frozenset({"deepseek_v3", "glm4_moe", "qwen2_moe", "qwen3_moe"}),
    parts={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
)
_FUSED_NAME = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")


def split_fused_experts(
    views: Mapping[str, torch.Tensor], *, model_type: str | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Replace fused expert tensors by one view per expert, named as in HF checkpoints.

    Args:
        views: HF-named tensors, a layer's experts perhaps fused: `gate_up_proj`
            [experts, 2 x ffn, hidden] and `down_proj` [experts, hidden, ffn].
        model_type: a family whose checkpoints hold one tensor per expert is split; another
            is left alone. None: what has both names and shapes that fit is split; families
            with other axes (gpt_oss) are left alone. Give it for a family that lies alike but
            is saved fused (qwen3_vl_moe).

    Raises:
        SourceError: `model_type` says fused experts, but the shapes are not theirs.
    """
    for name, view in views.items():
        match = _FUSED_NAME.fullmatch(name)
        if match is None or not _is_fused(views, match[1], name, model_type):
            yield name, view
            continue
        leaves = _EXPERT_STYLE.parts[match[2]]
        for leaf, part in zip(leaves, view.chunk(len(leaves), dim=1), strict=True):
            for expert, one in enumerate(part.unbind(0)):
                yield f"{match[1]}.{expert}.{leaf}.weight", one


def _is_fused(
    views: Mapping[str, torch.Tensor], module: str, name: str, model_type: str | None
) -> bool:
    if model_type is not None and model_type not in _EXPERT_STYLE.model_types:
        return False
    gate_up, down = views.get(f"{module}.gate_up_proj"), views.get(f"{module}.down_proj")
    shapes = [tuple(view.shape) for view in (gate_up, down) if view is not None]
    fits = (
        len(shapes) == 2
        and all(len(shape) == 3 for shape in shapes)
        and shapes[0] == (shapes[1][0], 2 * shapes[1][2], shapes[1][1])
    )
    if model_type is not None and not fits:
        raise SourceError(
            f"{name}: the fused experts of a {model_type} model are gate_up_proj [experts, "
            f"2 x ffn, hidden] and down_proj [experts, hidden, ffn]; given: {shapes}",
            remedy="give both tensors of a layer, and the model_type of the HF config",
        )
    return fits


def _pairs(named_tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    for name, tensor in pairs:
        if not isinstance(name, str) or not name:
            raise SourceError(f"a tensor's name is {name!r}", remedy="give (name, tensor) pairs")
        yield name, tensor
