"""A trainer's tensors in block-FP8 form: quantized anew for every update, into memory that stays.

Slots are allocated once for a layout and registered like any other memory; a push and a pull see
boxes of tensors in the engine's own form. Shards may be cut anywhere: of a block that is shared,
every holder tells its largest value (`measure`) and learns that of all (`settle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from engine_plugins.errors import SettingsError, SourceError
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.memory.source_memory import copy_memory
from engine_plugins.weights.sources.forms.block_fp8 import BLOCK, SCALE_SUFFIX, BlockFp8
from engine_plugins.weights.sources.forms.quantize_jobs import (
    Job,
    Quantize,
    block_quantizer,
    joined,
)
from engine_plugins.weights.sources.forms.shared_blocks import (
    Maxima,
    Piece,
    Run,
    SharedBlocks,
    pieces_of,
)

__all__ = ["BlockFp8Source", "quantized_source"]

ALIGNMENT_BYTES = 256
VALUES_AT_BYTES = 16
"""What addresses of values must be multiples of; others are quantized apart and copied."""
_FROM = (torch.bfloat16, torch.float32)


class BlockFp8Source:
    """Boxes of HF tensors as boxes of their block-FP8 form.

    For every update: `measure` on all processes, `settle` with what all of them said, then `boxes`.
    Before the first `settle`, `boxes` gives slots that hold nothing yet: what to register.

    Args:
        describe: this process's boxes as they are now, bfloat16 or float32 where they are
            quantized.
        form: which tensors are quantized.
        quantize: fills values and scales; what is not finite must not count for a scale.
    """

    def __init__(
        self,
        describe: Callable[[], Sequence[SourceBox]],
        form: BlockFp8,
        quantize: Quantize,
    ) -> None:
        self._describe = describe
        self._form = form
        self._quantize = quantize
        self._taken: Sequence[SourceBox] | None = None
        self._maxima: Maxima | None = None
        self._layout: list[tuple[object, ...]] = []
        self._slots: list[list[SourceBox]] = []
        """Of each box: values and scales, or a cast copy; none where it is offered itself."""

    def measure(self) -> list[SharedBlocks]:
        """Say what this process holds of blocks that reach beyond its boxes.

        Raises:
            SourceError: a matrix that cannot be quantized.
        """
        self._taken = self._describe()
        found: list[tuple[SourceBox, Piece, torch.Tensor]] = []
        with torch.no_grad():
            for box, piece in self._cut_pieces(self._taken):
                found.append((box, piece, _amax(_padded(box.data[piece.within(box.start)], piece))))
        return [_said(box.name, piece, amax.cpu()) for box, piece, amax in found]

    def settle(self, told: Iterable[SharedBlocks]) -> None:
        """Learn what all processes said, this one too."""
        grids = {box.name: _grid(box) for box, _ in self._cut_pieces(self._taken or ())}
        self._maxima = Maxima(told, grids)

    def boxes(self) -> list[SourceBox]:
        """Quantize what was measured last, and offer it.

        Raises:
            SourceError: a matrix that cannot be quantized.
        """
        taken, self._taken = self._describe() if self._taken is None else self._taken, None
        maxima, self._maxima = self._maxima, None
        self._lay_out(taken)
        if maxima is not None:
            with torch.no_grad():
                self._fill(taken, maxima)
        pairs = zip(taken, self._slots, strict=True)
        return [offered for box, slots in pairs for offered in slots or [box]]

    def release(self) -> None:
        """Let go of the slots, and of whatever was measured; the next `boxes` makes them anew."""
        self._taken = self._maxima = None
        self._layout, self._slots = [], []

    def _cut_pieces(self, boxes: Iterable[SourceBox]) -> Iterator[tuple[SourceBox, Piece]]:
        for box in boxes:
            if self._is_quantized(box):
                for piece in pieces_of(box.start, box.shape, box.global_shape, BLOCK):
                    if piece.is_cut:
                        yield box, piece

    def _is_quantized(self, box: SourceBox) -> bool:
        if not self._form.quantizes(box.name, box.global_shape):
            return False
        if box.data.dtype not in _FROM:
            raise SourceError(
                f"{box.name} is {box.data.dtype}, and is to be quantized to FP8",
                remedy="train in bfloat16 or float32, or name its module as one that is kept",
            )
        return True

    def _lay_out(self, boxes: Sequence[SourceBox]) -> None:
        """Give every box its slots; those of the last layout if it is the same."""
        layout: list[tuple[object, ...]] = [
            (box.name, box.global_shape, box.start, box.shape, box.data.dtype, box.data.device)
            for box in boxes
        ]
        if layout == self._layout:
            return
        self._layout, self._slots = [], []
        wanted = [list(self._wanted(box)) for box in boxes]
        memory = _Memory(zip(boxes, wanted, strict=True))
        self._slots = [
            [memory.next(each, box.data.device) for each in parts]
            for box, parts in zip(boxes, wanted, strict=True)
        ]
        self._layout = layout

    def _wanted(self, box: SourceBox) -> Iterator[SourceBox]:
        """What is offered for a box, without memory; nothing where it is offered itself."""
        if self._is_quantized(box):
            yield _meta(box.name, box.global_shape, box.start, box.shape, torch.float8_e4m3fn)
            first = [-(-start // BLOCK) for start in box.start]
            stops = [
                -(-(start + extent) // BLOCK)
                for start, extent in zip(box.start, box.shape, strict=True)
            ]
            shape = [stop - start for start, stop in zip(first, stops, strict=True)]
            name = box.name + SCALE_SUFFIX
            yield _meta(name, _grid(box), first, shape, torch.float32)
            return
        dtype = self._form.dtype_of(box.name, box.data.dtype)
        if dtype != box.data.dtype:
            yield _meta(box.name, box.global_shape, box.start, box.shape, dtype)

    def _fill(self, boxes: Sequence[SourceBox], maxima: Maxima) -> None:
        """Fill the slots of all boxes; pieces of shared blocks one by one, all else together."""
        whole: list[Job] = []
        for box, slots in zip(boxes, self._slots, strict=True):
            if self._is_quantized(box):
                values, scales = slots
                for piece in pieces_of(box.start, box.shape, box.global_shape, BLOCK):
                    inside = piece.within(box.start)
                    owned = piece.owned_blocks(BLOCK).within(scales.start)
                    job = Job(box.data[inside], values.data[inside], scales.data[owned])
                    if not piece.is_cut and _lies_well(job):
                        whole.append(job)
                    else:
                        self._fill_apart(box.name, piece, job, maxima)
            else:
                for slot in slots:
                    slot.data.copy_(box.data)
        for job in joined(whole):
            self._quantize(*job)

    def _fill_apart(self, name: str, piece: Piece, job: Job, maxima: Maxima) -> None:
        """Quantize a piece in whole blocks of its own; of what others hold, by their largest value.

        One element stands for all that others hold of a block: the scale is the same, and so are
        the bits of every other element.
        """
        blocks = piece.blocks(BLOCK)
        matrix = _padded(job.weights, piece)
        if piece.is_cut:
            amax = maxima.of(name, blocks).to(matrix)
            if piece.rows.cut:
                matrix[_foreign(piece.rows), ::BLOCK] = amax[0]
            else:
                matrix[::BLOCK, _foreign(piece.columns)] = amax[:, 0]
        values = torch.empty_like(matrix, dtype=torch.float8_e4m3fn)
        scales = torch.empty(blocks.shape, dtype=torch.float32, device=matrix.device)
        self._quantize(matrix, values, scales)
        inside = piece.within((blocks.rows.start * BLOCK, blocks.columns.start * BLOCK))
        job.values.view(torch.uint8).copy_(values.view(torch.uint8)[inside])
        owned = piece.owned_blocks(BLOCK)
        job.scales.copy_(scales[owned.within((blocks.rows.start, blocks.columns.start))])


def quantized_source(
    describe: Callable[[], Sequence[SourceBox]], form: BlockFp8 | str
) -> BlockFp8Source:
    """Make a source whose matrices are quantized by this project's kernels.

    Args:
        describe: this process's boxes as they are now.
        form: which tensors are quantized; `fp8` is the usual form.

    Raises:
        SettingsError: a form that does not exist.
        NotConfiguredError: the kernels are not installed.
    """
    if form == "fp8":
        form = BlockFp8()
    if not isinstance(form, BlockFp8):
        raise SettingsError(
            f"quantization is {form!r}, which is none that weights can be sent in",
            remedy="give 'fp8', a BlockFp8, or None",
        )
    quantize = block_quantizer(powers_of_two=form.ue8m0)
    return BlockFp8Source(describe, form, quantize)


class _Memory:
    """One allocation a device, from which slots are taken in order.

    Args:
        wanted: boxes of the trainer's, and what is offered for each.
    """

    def __init__(self, wanted: Iterable[tuple[SourceBox, Sequence[SourceBox]]]) -> None:
        sizes: dict[torch.device, int] = {}
        for box, parts in wanted:
            for part in parts:
                sizes[box.data.device] = sizes.get(box.data.device, 0) + _aligned(part.data.nbytes)
        self._memory = {
            device: copy_memory(torch.empty(1, dtype=torch.uint8, device=device).expand(size))
            for device, size in sizes.items()
        }
        self._used = dict.fromkeys(sizes, 0)

    def next(self, part: SourceBox, device: torch.device) -> SourceBox:
        """The box with memory behind it."""
        start, nbytes = self._used[device], part.data.nbytes
        self._used[device] += _aligned(nbytes)
        memory = self._memory[device][start : start + nbytes]
        return SourceBox(
            name=part.name,
            global_shape=part.global_shape,
            start=part.start,
            data=memory.view(part.data.dtype).view(part.shape),
        )


def _meta(
    name: str,
    whole: Sequence[int],
    start: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> SourceBox:
    data = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return SourceBox(name=name, global_shape=tuple(whole), start=tuple(start), data=data)


def _grid(box: SourceBox) -> tuple[int, int]:
    """Rows and columns of the blocks of a box's whole tensor."""
    rows, columns = (-(-extent // BLOCK) for extent in box.global_shape)
    return rows, columns


def _padded(data: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The data of a piece in whole blocks, zeros around it."""
    blocks = piece.blocks(BLOCK)
    rows, columns = (count * BLOCK for count in blocks.shape)
    matrix = torch.zeros((rows, columns), dtype=data.dtype, device=data.device)
    matrix[piece.within((blocks.rows.start * BLOCK, blocks.columns.start * BLOCK))] = data
    return matrix


def _amax(matrix: torch.Tensor) -> torch.Tensor:
    """float32 largest finite magnitude of each block of a matrix of whole blocks."""
    sizes = matrix.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).float().abs()
    return torch.where(sizes.isfinite(), sizes, 0).amax((1, 3))


def _said(name: str, piece: Piece, amax: torch.Tensor) -> SharedBlocks:
    blocks = piece.blocks(BLOCK)
    return SharedBlocks(
        name=name,
        first=(blocks.rows.start, blocks.columns.start),
        shape=blocks.shape,
        amax=amax.numpy().astype("<f4").tobytes(),
    )


def _foreign(run: Run) -> int:
    """An index, within its block, that a part of the block leaves out."""
    return 0 if run.start % BLOCK else run.stop % BLOCK


def _lies_well(job: Job) -> bool:
    """Whether a matrix and its slots can be given to a kernel as they are."""
    rows_whole = job.weights.shape[1] == 1 or job.weights.stride(1) == 1
    aligned = job.values.data_ptr() % VALUES_AT_BYTES == 0
    return rows_whole and aligned and job.values.is_contiguous() and job.scales.is_contiguous()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
