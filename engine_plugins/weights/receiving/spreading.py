"""Short rows spread in few copies: pieces at even distances are one strided copy.

A layer's experts come as thousands of pieces of one form, which lie at even distances in the
scratch area and where they go. Each copy costs tens of microseconds of Python, while the engine
stands still.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine_plugins.weights.planning.plan_data import PackedPiece, PieceForm

__all__ = ["Run", "runs_of"]


class Run(NamedTuple):
    """Pieces of one form at even distances, in bytes."""

    form: PieceForm
    scratch: int
    target: int
    scratch_step: int
    target_step: int
    pieces: int

    @property
    def wanted_shape(self) -> tuple[int, ...]:
        """Of what is wanted of all of them together."""
        return (self.pieces, *(part.stop - part.start for part in self.form.wanted))

    def singles(self) -> list[Run]:
        """Each piece as a run of its own."""
        return [
            self._replace(
                scratch=self.scratch + number * self.scratch_step,
                target=self.target + number * self.target_step,
                pieces=1,
            )
            for number in range(self.pieces)
        ]


def runs_of(pieces: Sequence[PackedPiece]) -> list[Run]:
    """Join pieces of one form that go up by the same steps, whatever comes between them."""
    runs: list[Run] = []
    newest: dict[int, int] = {}  # by form, which those of a plan share
    for piece in pieces:
        at = newest.get(id(piece.form))
        longer = None if at is None else _longer(runs[at], piece)
        if at is None or longer is None:
            newest[id(piece.form)] = len(runs)
            runs.append(Run(piece.form, piece.scratch_offset, piece.target, 0, 0, 1))
        else:
            runs[at] = longer
    return runs


def _longer(run: Run, piece: PackedPiece) -> Run | None:
    steps = (
        piece.scratch_offset - run.scratch - (run.pieces - 1) * run.scratch_step,
        piece.target - run.target - (run.pieces - 1) * run.target_step,
    )
    if run.pieces == 1:
        item = piece.form.dtype.itemsize
        if min(steps) <= 0 or any(step % item for step in steps):
            return None
    elif steps != (run.scratch_step, run.target_step):
        return None
    return run._replace(scratch_step=steps[0], target_step=steps[1], pieces=run.pieces + 1)
