"""Experts that `transformers` holds fused, as one HF tensor for each: of tensors without a model.

`transformers` >= 5 keeps a layer's experts in two tensors while checkpoints and engines speak of
one tensor per expert and projection. Where the model or its config is given, transformers says
what becomes of them (`hf_model.py`); here they are known by names and shapes alone. They are split
as boxes, so that a share of a fused tensor becomes shares of experts, along whichever axes it was
sharded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.placement import SourceBox

__all__ = ["split_fused_experts"]


# gate_up_proj [experts, 2 x ffn, hidden] and down_proj [experts, hidden, ffn] hold, along axis 1,
# what checkpoints name one by one.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
_FUSED_NAME = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")


def split_fused_experts(boxes: Sequence[SourceBox]) -> Iterator[SourceBox]:
    """Replace boxes of fused expert tensors by boxes of each expert, named as in checkpoints.

    Args:
        boxes: of HF-named tensors, a layer's experts perhaps fused: `gate_up_proj`
            [experts, 2 x ffn, hidden] and `down_proj` [experts, hidden, ffn]. Both names with
            shapes that fit are split; families with other axes (gpt_oss) are left alone.

    Raises:
        SourceError: an expert is given on its own and fused too.
    """
    shapes = {box.name: box.global_shape for box in boxes}
    for box in boxes:
        match = _FUSED_NAME.fullmatch(box.name)
        if match is None or not _is_fused(shapes, match[1]):
            yield box
            continue
        for one in _expert_boxes(box, match[1], _PARTS[match[2]]):
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


def _is_fused(shapes: Mapping[str, tuple[int, ...]], module: str) -> bool:
    given = [shapes.get(f"{module}.{leaf}", ()) for leaf in _PARTS]
    return all(len(shape) == 3 for shape in given) and (
        given[0] == (given[1][0], 2 * given[1][2], given[1][1])
    )
