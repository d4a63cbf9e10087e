"""A trainer's matrices in block-FP8 form: quantized anew for every update, into slots.

Shards may be cut anywhere: of a block that is shared, every holder tells its largest value
(`measure`) and learns that of all (`settle`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from engine_plugins.errors import SettingsError, SourceError
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.forms.block_fp8 import BLOCK, SCALE_SUFFIX, BlockFp8
from engine_plugins.weights.sources.forms.form_source import Filled
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
from engine_plugins.weights.sources.forms.slots import part_of

__all__ = ["BlockFp8Form", "quantized_form"]

VALUES_AT_BYTES = 16
"""What addresses of values must be multiples of; others are quantized apart and copied."""
_FROM = (torch.bfloat16, torch.float32)


class BlockFp8Form:
    """The `Form` of HF matrices that are sent as block FP8.

    Args:
        form: which tensors are quantized; these must be bfloat16 or float32.
        quantize: fills values and scales; what is not finite must not count for a scale.
    """

    def __init__(self, form: BlockFp8, quantize: Quantize) -> None:
        self._form = form
        self._quantize = quantize
        self._maxima: Maxima | None = None
        self.changes = 0

    def parts(self, box: SourceBox) -> Sequence[SourceBox]:
        """Values and scales of a matrix that is quantized.

        Raises:
            SourceError: a matrix that cannot be quantized.
        """
        return list(self._values_and_scales(box)) if self._is_quantized(box) else ()

    def measure(self, boxes: Sequence[SourceBox]) -> list[SharedBlocks]:
        """Say what this process holds of blocks that reach beyond its boxes.

        Raises:
            SourceError: a matrix that cannot be quantized.
        """
        found: list[tuple[SourceBox, Piece, torch.Tensor]] = []
        for box, piece in self._cut_pieces(boxes):
            found.append((box, piece, _amax(_padded(box.data[piece.within(box.start)], piece))))
        return [_said(box.name, piece, amax.cpu()) for box, piece, amax in found]

    def settle(self, told: Iterable[SharedBlocks], boxes: Sequence[SourceBox]) -> None:
        """Learn what all processes said, this one too."""
        grids = {box.name: _grid(box) for box, _ in self._cut_pieces(boxes)}
        self._maxima = Maxima(told, grids)

    def fill(self, filled: Sequence[Filled]) -> None:
        """Fill the slots of all boxes; pieces of shared blocks one by one, all else together."""
        maxima, self._maxima = self._maxima, None
        if maxima is None:
            return
        whole: list[Job] = []
        for box, (values, scales) in filled:
            for piece in pieces_of(box.start, box.shape, box.global_shape, BLOCK):
                inside = piece.within(box.start)
                owned = piece.owned_blocks(BLOCK).within(scales.start)
                job = Job(box.data[inside], values.data[inside], scales.data[owned])
                if not piece.is_cut and _lies_well(job):
                    whole.append(job)
                else:
                    self._fill_apart(box.name, piece, job, maxima)
        for job in joined(whole):
            self._quantize(*job)

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

    def _values_and_scales(self, box: SourceBox) -> Iterator[SourceBox]:
        yield part_of(box, torch.float8_e4m3fn)
        first = [-(-start // BLOCK) for start in box.start]
        stops = [
            -(-(start + extent) // BLOCK)
            for start, extent in zip(box.start, box.shape, strict=True)
        ]
        shape = [stop - start for start, stop in zip(first, stops, strict=True)]
        name = box.name + SCALE_SUFFIX
        yield part_of(box, torch.float32, name=name, whole=_grid(box), start=first, shape=shape)

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


def quantized_form(form: BlockFp8 | str) -> BlockFp8Form:
    """The form whose matrices are quantized by this project's kernels.

    Args:
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
    return BlockFp8Form(form, block_quantizer(powers_of_two=form.ue8m0))


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
