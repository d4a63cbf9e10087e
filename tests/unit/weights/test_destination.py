"""Where each box of a tensor goes, found from the copies that a loader makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.destination import DestinationMap, destination_map
from engine_plugins.weights.loader.loader_trace import trace_loader

Copy = Callable[[dict[str, torch.Tensor], torch.Tensor], object]


def traced(
    shape: tuple[int, ...], parameters: dict[str, torch.Tensor], copy: Copy
) -> DestinationMap:
    """The map of a loader that does `copy(parameters, w)` for one tensor `w`."""

    def load(weights: object) -> None:
        for _, weight in weights:  # type: ignore[attr-defined]
            copy(parameters, weight)

    tensors = [LogicalTensor(name="w", shape=shape, dtype=torch.float32)]
    return destination_map(trace_loader(parameters, load, tensors), tensors)


def landed(found: DestinationMap, values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The parameter after the map's boxes of `values` were put in their places."""
    for box in (box for boxes in found.boxes.values() for box in boxes):
        of = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
        parameter.as_strided(box.shape, box.strides, box.offset).copy_(values[of])
    return parameter


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w,
        lambda w: w.narrow(0, 4, 4),
        lambda w: w.chunk(2, dim=1)[1],
        lambda w: w.t()[1:3],
        lambda w: w[5],
        lambda w: w[:, 2],
        lambda w: w.view(2, 4, 6)[1],
        lambda w: w.flatten(),
        lambda w: w.flatten()[6:18],
        lambda w: w.flatten()[19:22],
        lambda w: w[2:3, 1:4],
    ],
)
def test_the_boxes_of_a_view_land_where_the_copy_put_them(
    read: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    values = torch.randn(8, 6)
    wanted = read(values).contiguous()
    meta = {"m.p": torch.empty(wanted.shape, device="meta")}
    found = traced((8, 6), meta, lambda p, w: p["m.p"].copy_(read(w)))
    assert torch.equal(landed(found, values, torch.full_like(wanted, torch.nan)), wanted)


@given(st.data())
def test_any_narrowed_and_permuted_box_lands_as_copied(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    counts = [data.draw(st.integers(1, s - a)) for s, a in zip(shape, starts, strict=True)]
    order = data.draw(st.permutations(range(len(shape))))

    def read(weight: torch.Tensor) -> torch.Tensor:
        for axis, (first, count) in enumerate(zip(starts, counts, strict=True)):
            weight = weight.narrow(axis, first, count)
        return weight.permute(*order)

    values = torch.randn(shape)
    wanted = torch.full((2, *read(values).shape), torch.nan)
    meta = {"m.p": torch.empty(wanted.shape, device="meta")}
    found = traced(shape, meta, lambda p, w: p["m.p"][1].copy_(read(w)))
    ours = landed(found, values, wanted.clone())
    wanted[1].copy_(read(values))
    assert torch.equal(ours.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize(
    ("copy", "reason"),
    [
        (lambda p, w: p["m.p"].copy_(w[::2]), "steps that are no box"),
        (lambda p, w: p["m.p"].copy_(w[:4] + 1), "computes m.p from w"),
        (lambda p, w: p["m.h"].copy_(w[:4]), "cast from torch.float32 to torch.bfloat16"),
        (lambda p, w: p["m.p"].copy_(w.flatten()[3:27].view(4, 6)), "steps that are no box"),
    ],
)
def test_what_is_no_copy_of_a_box_keeps_its_module_out(copy: Copy, reason: str) -> None:
    parameters = {
        "m.p": torch.empty(4, 6, device="meta"),
        "m.h": torch.empty(4, 6, device="meta", dtype=torch.bfloat16),
        "m.good": torch.empty(8, 6, device="meta"),
        "n.good": torch.empty(8, 6, device="meta"),
    }

    def load(p: dict[str, torch.Tensor], w: torch.Tensor) -> None:
        copy(p, w)
        p["m.good"].copy_(w)
        p["n.good"].copy_(w)

    found = traced((8, 6), parameters, load)
    assert list(found.boxes) == ["n"]
    assert reason in found.reasons["m"]


def test_constants_and_repeated_copies_count_once() -> None:
    parameters = {"m.p": torch.empty(10, 6, device="meta")}

    def load(p: dict[str, torch.Tensor], w: torch.Tensor) -> None:
        p["m.p"][8:].fill_(0)
        p["m.p"][:8].copy_(w)
        p["m.p"][:8].copy_(w)

    assert len(traced((8, 6), parameters, load).boxes["m"]) == 1


def test_a_module_whose_parameter_is_changed_after_the_copy_is_left_to_the_loader() -> None:
    def copy(parameters: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        parameters["m.p"].copy_(weight).mul_(2)

    found = traced((4, 4), {"m.p": torch.empty(4, 4, device="meta")}, copy)
    assert found.boxes == {}
    assert found.reasons == {"m": "the loader computes m.p from w"}
