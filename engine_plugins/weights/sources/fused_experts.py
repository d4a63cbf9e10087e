"""Experts that `transformers` holds fused, as one HF tensor for each.

`transformers` >= 5 keeps a layer's experts in two tensors while checkpoints and engines speak of
one tensor per expert and projection. They are split as boxes, so that a share of a fused tensor
becomes shares of experts, along whichever axes it was sharded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.placement import SourceBox

__all__ = ["split_fused_experts"]


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
    boxes: Sequence[SourceBox], *, model_type: str | None = None
) -> Iterator[SourceBox]:
    """Replace boxes of fused expert tensors by boxes of each expert, named as in checkpoints.

    Args:
        boxes: of HF-named tensors, a layer's experts perhaps fused: `gate_up_proj`
            [experts, 2 x ffn, hidden] and `down_proj` [experts, hidden, ffn].
        model_type: a family whose checkpoints hold one tensor per expert is split; another
            is left alone. None: what has both names and shapes that fit is split; families
            with other axes (gpt_oss) are left alone. Give it for a family that lies alike but
            is saved fused (qwen3_vl_moe).

    Raises:
        SourceError: `model_type` says fused experts, but the shapes are not theirs; or an expert
            is also given on its own.
    """
    shapes = {box.name: box.global_shape for box in boxes}
    for box in boxes:
        match = _FUSED_NAME.fullmatch(box.name)
        if match is None or not _is_fused(shapes, match[1], box.name, model_type):
            yield box
            continue
        for one in _expert_boxes(box, match[1], _EXPERT_STYLE.parts[match[2]]):
            if one.name in shapes:
                raise SourceError(
                    f"{one.name}: given on its own and inside a fused experts tensor",
                    remedy="give each expert once",
                )
            yield one


def _expert_boxes(box: SourceBox, module: str, leaves: Sequence[str]) -> Iterator[SourceBox]:
    """Split a box [experts, rows, columns] of a fused tensor; parts that it lacks are left out."""
    _, all_rows, columns = box.global_shape
    rows = all_rows // len(leaves)
    first_expert, first_row, first_column = box.start
    for number, leaf in enumerate(leaves):
        start = max(number * rows, first_row)
        stop = min((number + 1) * rows, first_row + box.shape[1])
        if start >= stop:
            continue
        part = box.data[:, start - first_row : stop - first_row]
        for expert, one in enumerate(part.unbind(0), first_expert):
            yield SourceBox(
                name=f"{module}.{expert}.{leaf}.weight",
                global_shape=(rows, columns),
                start=(start - number * rows, first_column),
                data=one,
            )


def _is_fused(
    shapes: Mapping[str, tuple[int, ...]], module: str, name: str, model_type: str | None
) -> bool:
    if model_type is not None and model_type not in _EXPERT_STYLE.model_types:
        return False
    pair = [shapes.get(f"{module}.{leaf}") for leaf in _EXPERT_STYLE.parts]
    given = [shape for shape in pair if shape is not None]
    fits = (
        len(given) == 2
        and all(len(shape) == 3 for shape in given)
        and given[0] == (given[1][0], 2 * given[1][2], given[1][1])
    )
    if model_type is not None and not fits:
        raise SourceError(
            f"{name}: the fused experts of a {model_type} model are gate_up_proj [experts, "
            f"2 x ffn, hidden] and down_proj [experts, hidden, ffn]; given: {given}",
            remedy="give both tensors of a layer, and the model_type of the HF config",
        )
    return fits
