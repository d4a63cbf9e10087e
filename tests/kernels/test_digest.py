"""The digest adds up whatever the cut, and sees what changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_kernels import BufferMismatchError, add_digest
from engine_kernels.digest.reference import column_keys, row_keys


def digest(tensor: torch.Tensor) -> int:
    into = torch.zeros(1, dtype=torch.int64)
    add_digest(tensor, into)
    return int(into) % 2**64


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_it_is_what_the_definition_says() -> None:
    """Computed in Python's whole numbers."""
    tensor = random(2, 3, 5)
    rows, columns = row_keys(torch.arange(6)).tolist(), column_keys(torch.arange(5)).tolist()
    bits = tensor.view(torch.int16).reshape(6, 5).tolist()
    expected = sum(
        (bits[row][column] % 2**16 + 1) * rows[row] * columns[column]
        for row, column in itertools.product(range(6), range(5))
    )
    assert digest(tensor) == expected % 2**64


def test_keys_are_odd_and_differ() -> None:
    keys = torch.cat([row_keys(torch.arange(1 << 16)), column_keys(torch.arange(1 << 16))])
    assert bool((keys & 1).all())
    assert len(keys.unique()) == len(keys)
    assert row_keys(torch.tensor([0])).item() % 2**64 == splitmix64(0x9E3779B97F4A7C15) | 1


def splitmix64(state: int) -> int:
    """The first output after a state, as its authors write it."""
    z = state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@given(st.data())
def test_boxes_of_any_cut_add_up(data: st.DataObject) -> None:
    """Up to five axes, cut again and again; the parts lie anywhere in memory, in any order."""
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]))
    count = torch.Size(shape).numel()
    whole = torch.randint(-128, 127, (count * dtype.itemsize,), dtype=torch.int8)
    tensor = whole.view(dtype).view(shape)
    boxes = [[(0, size) for size in shape]]
    for _ in range(data.draw(st.integers(0, 6))):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        axis = data.draw(st.integers(0, len(shape) - 1))
        low, high = box[axis]
        cut = data.draw(st.integers(low, high))
        boxes.extend([*box[:axis], part, *box[axis + 1 :]] for part in ((low, cut), (cut, high)))
    into = torch.zeros(1, dtype=torch.int64)
    for box in data.draw(st.permutations(boxes)):
        part = tensor[tuple(slice(*edges) for edges in box)]
        held = part.clone() if data.draw(st.booleans()) else part
        add_digest(held, into, shape=shape, start=[low for low, _ in box])
    assert int(into) % 2**64 == digest(tensor)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_a_flipped_bit_is_seen_whichever_it_is(dtype: torch.dtype) -> None:
    tensor = random(3, 8, dtype=dtype)
    before, seen = digest(tensor), set[int]()
    bits = tensor.view(torch.uint8).view(-1)
    for byte, bit in itertools.product(range(len(bits)), range(8)):
        bits[byte] ^= 1 << bit
        seen.add(digest(tensor))
        bits[byte] ^= 1 << bit
    assert before not in seen
    if dtype.itemsize < 8:
        assert len(seen) == 8 * len(bits)


def test_what_is_moved_is_seen() -> None:
    """Elements and rows that change places, another shape, a sign here and there."""
    tensor = random(64, 65)
    changed = {"as it was": tensor}
    for name, places in {
        "in a row": ((3, 4), (3, 60)),
        "in a column": ((3, 4), (50, 4)),
        "far": ((0, 0), (63, 64)),
    }.items():
        changed[name] = tensor.clone()
        first, second = places
        changed[name][first], changed[name][second] = tensor[second], tensor[first]
    changed["rows"] = tensor[[1, 0, *range(2, 64)]]
    changed["turned"] = tensor.flip(0, 1)
    changed["flat"] = tensor.view(-1)
    changed["reshaped"] = tensor.view(65, 64)
    changed["signs of a row"] = tensor.clone()
    changed["signs of a row"][5].neg_()
    changed["all signs"] = -tensor
    assert len({digest(each) for each in changed.values()}) == len(changed)


def test_zeros_count() -> None:
    """A part that is missing is seen where the weights are zero, too."""
    zeros = torch.zeros(8, 8)
    assert len({digest(zeros), digest(zeros[:7]), digest(zeros[:, :7]), 0}) == 4


def test_strides_do_not_matter() -> None:
    tensor = random(6, 7, 8)
    assert digest(tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)) == digest(tensor)
    assert digest(random(2, 3).t()) == digest(random(2, 3).t().contiguous())


@pytest.mark.parametrize(
    ("shape", "start"), [((4, 4), (1, 0)), ((4, 4), (-1, 0)), ((4,), (0,)), ((4, 4, 4), (0, 0, 0))]
)
def test_a_box_outside_is_refused(shape: tuple[int, ...], start: tuple[int, ...]) -> None:
    into = torch.tensor([5])
    with pytest.raises(BufferMismatchError, match=r"a box of \[4, 4\] at .* does not lie in"):
        add_digest(torch.zeros(4, 4), into, shape=shape, start=start)
    assert into.item() == 5


def test_sums_and_elements_of_other_kinds_are_refused() -> None:
    with pytest.raises(BufferMismatchError, match="into is int32, not int64"):
        add_digest(torch.zeros(4), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(BufferMismatchError, match=r"into has shape \[2\]"):
        add_digest(torch.zeros(4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(BufferMismatchError, match="16 bytes"):
        add_digest(torch.zeros(4, dtype=torch.complex128), torch.zeros(1, dtype=torch.int64))
