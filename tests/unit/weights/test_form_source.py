"""Slots: laid out once, filled once an update, and never before the trainer's work is done."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.forms import form_source
from engine_plugins.weights.sources.forms.cast import Cast, SentDtypes
from engine_plugins.weights.sources.forms.form_source import FormSource
from engine_plugins.weights.sources.remembered import KnownBoxes

BF16 = torch.bfloat16


def box(name: str, data: torch.Tensor) -> SourceBox:
    shape = tuple(data.shape)
    return SourceBox(name=name, global_shape=shape, start=(0,) * len(shape), data=data)


def refreshed(source: FormSource) -> dict[str, torch.Tensor]:
    source.settle(())
    return {each.name: each.data for each in source.boxes()}


def test_nothing_is_copied_where_nothing_is_cast() -> None:
    """The very boxes, so that whoever knows that they have not moved still does."""
    boxes = KnownBoxes([box("w", torch.randn(3)), box("n", torch.arange(2))])
    source = FormSource(lambda: boxes, [Cast(SentDtypes(torch.float32, learns=False))])
    source.settle(())
    assert source.boxes() is boxes
    assert source.slot_bytes == 0


def test_unmoved_boxes_are_offered_by_the_same_object_until_other_dtypes_are_learned() -> None:
    """Values change, and nothing is described or laid out anew."""
    boxes = KnownBoxes([box("w", torch.randn(4, 3)), box("router", torch.randn(3))])
    dtypes = SentDtypes(None, learns=True)
    source = FormSource(lambda: boxes, [Cast(dtypes)])
    assert refreshed(source)["w"] is boxes[0].data
    dtypes.learn({"w": BF16})
    first = refreshed(source)
    offered = source.boxes()
    boxes[0].data.mul_(2)
    again = refreshed(source)
    assert source.boxes() is offered
    assert again["w"] is first["w"]
    assert torch.equal(again["w"], boxes[0].data.to(BF16))
    assert again["router"] is boxes[1].data
    dtypes.learn({"router": torch.float64})
    assert refreshed(source)["router"].dtype == torch.float64


def test_slots_are_filled_once_an_update() -> None:
    """What is looked at again, to register it, is not cast again."""
    data = torch.ones(5)
    source = FormSource(lambda: [box("w", data)], [Cast(SentDtypes(torch.float16, learns=False))])
    held = refreshed(source)["w"]
    data.fill_(2)
    source.boxes()
    assert torch.equal(held, torch.ones(5).half())
    refreshed(source)
    assert torch.equal(held, data.half())


def test_boxes_that_moved_keep_their_slots_and_other_shapes_get_new_ones() -> None:
    held = {"w": torch.randn(4)}
    source = FormSource(
        lambda: [box(name, each) for name, each in held.items()],
        [Cast(SentDtypes(BF16, learns=False))],
    )
    first = refreshed(source)["w"].data_ptr()
    held["w"] = torch.randn(4)
    moved = refreshed(source)["w"]
    assert moved.data_ptr() == first
    assert torch.equal(moved, held["w"].to(BF16))
    held["w"] = torch.randn(2000)
    assert torch.equal(refreshed(source)["w"], held["w"].to(BF16))
    assert source.slot_bytes == 4096
    source.release()
    assert source.slot_bytes == 0


@pytest.mark.parametrize("shape", [(6, 4), (0, 4), ()])
def test_any_layout_is_cast_to_contiguous_memory(shape: tuple[int, ...]) -> None:
    """Transposed, with gaps, empty, without axes; a box without elements has the dtype too."""
    whole = torch.randn(shape)
    boxes = [
        box("t", whole.t() if whole.ndim else whole),
        box("g", whole[..., ::2] if shape else whole),
    ]
    source = FormSource(lambda: boxes, [Cast(SentDtypes(BF16, learns=False))])
    found = refreshed(source)
    for each in boxes:
        assert found[each.name].is_contiguous()
        assert torch.equal(found[each.name], each.data.to(BF16))


def test_work_on_any_stream_is_waited_for_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An optimizer's step on another stream ends only when it is waited for."""
    data = torch.zeros(4)

    def ends(tensors: Iterable[torch.Tensor]) -> None:
        assert any(each is data for each in tensors)
        data.fill_(7)

    monkeypatch.setattr(form_source, "finish_queued_work", ends)
    source = FormSource(lambda: [box("w", data)], [Cast(SentDtypes(BF16, learns=False))])
    assert torch.equal(refreshed(source)["w"], torch.full((4,), 7, dtype=BF16))
