"""How Megatron-Core lays a parameter out over ranks, as pieces of HF tensors.

Two questions are enough for every parameter. *Roles* say which axis is cut, and over which group
of ranks. *Rows* say in which order the whole parameter's rows hold those of its HF tensors: one
after the other, gate and up by rank, or by query group. A shard is then an equal slice, and a
replica is a slice of one. Nothing here knows a parameter's name.
Source of the layouts: megatron-core 0.16.1, read on CPU and confirmed by HF logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

import torch

from engine_plugins.errors import SourceError

__all__ = ["Cut", "Heads", "Piece", "Role", "Rows", "Shard", "cut_shard", "with_output_gate"]

Shape = tuple[int, ...]


class Cut(Enum):
    """Which axis of a parameter is cut into equal slices."""

    REPLICATED = "replicated"
    """None: every rank holds the whole."""
    COLUMN = "column"
    """The rows, axis 0 (Megatron's column-parallel)."""
    ROW = "row"
    """The columns, axis 1 (Megatron's row-parallel)."""


class Role(Enum):
    """What a parameter is to the parallel groups."""

    REPLICATED = "replicated"
    COLUMN = "column"
    ROW = "row"
    VOCABULARY = "vocabulary_parallel"
    """The embedding, cut on its padded vocabulary."""
    FUSED_QKV = "fused_qkv"
    EXPERT_COLUMN = "expert_column"
    """Of one expert: cut over the experts' own tensor-parallel group."""
    EXPERT_ROW = "expert_row"

    @property
    def cut(self) -> Cut:
        """The axis that this role cuts."""
        return _CUTS[self]

    @property
    def is_expert(self) -> bool:
        """Whether the experts' tensor-parallel group cuts it, not the dense one."""
        return self in (Role.EXPERT_COLUMN, Role.EXPERT_ROW)


_CUTS = {
    Role.REPLICATED: Cut.REPLICATED,
    Role.COLUMN: Cut.COLUMN,
    Role.ROW: Cut.ROW,
    Role.VOCABULARY: Cut.COLUMN,
    Role.FUSED_QKV: Cut.COLUMN,
    Role.EXPERT_COLUMN: Cut.COLUMN,
    Role.EXPERT_ROW: Cut.ROW,
}


class Rows(Enum):
    """In which order a parameter's rows hold those of its HF tensors."""

    PLAIN = "plain"
    """One HF tensor."""
    PADDED = "padded"
    """One HF tensor, and padding after its last row."""
    GATED = "gated"
    """Each rank holds its own `[gate; up]`, or blocks of its gate and up by turns."""
    SEGMENTS = "segments"
    """One HF tensor of several stretches, of each of which a rank holds its share."""
    DELTA_NET = "delta_net"
    """Each rank holds its `[q; k; v; z; b; a]`; HF one tensor of `[q, k, v, z]` per key head, and
    one of `[b, a]`."""
    STACKED = "stacked"
    """One expert's, transposed, of an HF tensor of all experts."""
    STACKED_GATED = "stacked_gated"
    """The same, with gate and up by turns in HF's last axis."""
    QKV = "qkv"
    """`[q x (heads / groups), k, v]` per query group, or `[q.., z.., k, v]` with an output gate.

    With fewer groups than ranks a slice begins and ends inside a group.
    """


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A model's attention heads, and the groups of them that share a key and a value."""

    heads: int
    groups: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's share of one native parameter.

    Attributes:
        name: the native name, for messages.
        data: view of the trainer's memory.
        index: the rank's place in the group that cuts this parameter.
        count: size of that group; 1 for what is replicated.
        glu_interleave: rows of gate and of up that a share keeps by turns; None: all of its gate
            before all of its up.
    """

    name: str
    data: torch.Tensor
    index: int
    count: int
    glu_interleave: int | None = None

    def expect(self, shape: Shape) -> None:
        """Raise SourceError unless the share has the shape that the config gives it."""
        if tuple(self.data.shape) != shape:
            raise SourceError(
                f"{self.name}: shard {self.index} of {self.count} has shape "
                f"{tuple(self.data.shape)}, but the model config gives {shape}",
                remedy="check the parallel sizes given and that the config is this model's",
            )

    def share(self, extent: int, what: str) -> tuple[int, int]:
        """Half-open range of this shard in an axis of `extent` elements cut equally."""
        if extent % self.count:
            raise SourceError(
                f"{self.name}: {extent} {what} cannot be cut into {self.count} equal shards",
                remedy="check the parallel sizes given and that the config is this model's",
            )
        size = extent // self.count
        return self.index * size, (self.index + 1) * size


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A box of one of a parameter's HF tensors: which, from where, and the memory."""

    part: int
    start: Shape
    data: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring rows of the whole parameter that are neighbours in one HF tensor as well."""

    part: int
    first: int
    rows: int


def cut_shard(
    rows: Rows,
    cut: Cut,
    shard: Shard,
    wholes: Sequence[Shape],
    heads: Heads | None,
    segments: Sequence[int] = (),
) -> list[Piece]:
    """Say which boxes of the HF tensors a shard holds.

    Args:
        rows: the order of the parameter's rows.
        cut: the axis that is cut.
        shard: this rank's share.
        wholes: shapes of the parameter's HF tensors, in the order of the fused rows.
        heads: the model's attention heads; needed for `Rows.QKV` alone.
        segments: for `Rows.SEGMENTS` rows of each stretch of the HF tensor; for `Rows.DELTA_NET`
            key heads, rows of each, value heads, rows of each.

    Returns:
        Views of the shard; empty where it holds vocabulary padding alone.

    Raises:
        SourceError: the shard's shape is not what the config and the coordinates give.
    """
    if cut is Cut.ROW:
        return _cut_columns(shard, wholes)
    if rows is Rows.PADDED:
        return _cut_padded(shard, wholes)
    if rows is Rows.SEGMENTS:
        return _cut_runs(shard, wholes[0][1:], _segment_runs(shard, wholes, segments))
    if rows is Rows.DELTA_NET:
        return _cut_runs(shard, wholes[0][1:], _delta_net_runs(shard, segments))
    return _cut_runs(shard, wholes[0][1:], _RUNS[rows](shard, wholes, heads))


def with_output_gate(shard: Shard, wholes: Sequence[Shape]) -> list[Shape]:
    """The HF shapes of a fused QKV whose shard may hold an output gate beside each query.

    No HF config says so in a common way, but the rows do: a gate is as tall as the queries,
    and HF's `q_proj` then holds both, head by head.

    Args:
        shard: of the fused parameter.
        wholes: shapes of q, k and v without a gate.
    """
    query, *others = wholes
    fused = sum(whole[0] for whole in wholes)
    if shard.data.ndim and shard.data.shape[0] * shard.count == fused + query[0]:
        return [(2 * query[0], *query[1:]), *others]
    return list(wholes)


def _cut_columns(shard: Shard, wholes: Sequence[Shape]) -> list[Piece]:
    ((rows, columns),) = wholes
    first, last = shard.share(columns, "columns")
    shard.expect((rows, last - first))
    return [Piece(part=0, start=(0, first), data=shard.data)]


def _cut_padded(shard: Shard, wholes: Sequence[Shape]) -> list[Piece]:
    ((vocab, *rest),) = wholes
    rows = shard.data.shape[0] if shard.data.ndim else 0
    shard.expect((rows, *rest))
    if rows * shard.count < vocab:
        raise SourceError(
            f"{shard.name}: {shard.count} shards of {rows} rows cannot hold the config's "
            f"vocabulary of {vocab}",
            remedy="check tp_size and vocab_size",
        )
    first = shard.index * rows
    kept = min(rows, vocab - first)
    if kept <= 0:
        return []
    return [Piece(part=0, start=(first, *(0 for _ in rest)), data=shard.data[:kept])]


def _cut_runs(shard: Shard, rest: Shape, runs: Sequence[_Run]) -> list[Piece]:
    """Intersect the whole parameter's runs with this shard's equal slice of its rows."""
    first, last = shard.share(sum(run.rows for run in runs), "fused rows")
    shard.expect((last - first, *rest))
    corner = (0,) * len(rest)
    pieces = []
    begin = 0
    for run in runs:
        low, high = max(begin, first), min(begin + run.rows, last)
        if low < high:
            start = (run.first + low - begin, *corner)
            data = shard.data if high - low == last - first else shard.data[low - first :]
            pieces.append(Piece(part=run.part, start=start, data=data[: high - low]))
        begin += run.rows
    return pieces


def _plain_runs(_shard: Shard, wholes: Sequence[Shape], _heads: Heads | None) -> list[_Run]:
    (whole,) = wholes
    return [_Run(0, 0, whole[0])]


def _gated_runs(shard: Shard, wholes: Sequence[Shape], _heads: Heads | None) -> list[_Run]:
    gate, up = (_blocks(shard, whole[0], shard.count, "rows") for whole in wholes)
    turns = _blocks(shard, gate, shard.glu_interleave, "gate rows") if shard.glu_interleave else 1
    gate, up = gate // turns, _blocks(shard, up, turns, "up rows")
    return [
        run
        for turn in range(shard.count * turns)
        for run in (_Run(0, turn * gate, gate), _Run(1, turn * up, up))
    ]


def _segment_runs(shard: Shard, wholes: Sequence[Shape], segments: Sequence[int]) -> list[_Run]:
    ((rows, *_),) = wholes
    if sum(segments) != rows:
        raise SourceError(
            f"{shard.name}: segments of {list(segments)} rows are not the tensor's {rows} rows",
            remedy="check the parallel sizes given and that the config is this model's",
        )
    starts = accumulate(segments, initial=0)
    shares = [
        (start, _blocks(shard, segment, shard.count, "rows"))
        for start, segment in zip(starts, segments, strict=False)
    ]
    return [
        _Run(0, start + index * share, share)
        for index in range(shard.count)
        for start, share in shares
    ]


def _delta_net_runs(shard: Shard, segments: Sequence[int]) -> list[_Run]:
    keys, key_rows, values, value_rows = segments
    per_key = _blocks(shard, values, keys, "value heads")
    own = _blocks(shard, keys, shard.count, "key heads")
    qkvz = [key_rows, key_rows, per_key * value_rows, per_key * value_rows]
    parts = [(0, qkvz, place) for place in range(4)] + [(1, [per_key] * 2, n) for n in range(2)]
    return [
        _Run(part, head * sum(extents) + sum(extents[:place]), extents[place])
        for rank in range(shard.count)
        for part, extents, place in parts
        for head in range(rank * own, (rank + 1) * own)
    ]


def _qkv_runs(shard: Shard, wholes: Sequence[Shape], heads: Heads | None) -> list[_Run]:
    if heads is None:
        raise SourceError(f"{shard.name}: fused QKV rows of a model without query groups")
    query, key, value = (whole[0] for whole in wholes)
    head_dim = _blocks(shard, key, heads.groups, "key rows")
    slots = _blocks(shard, query, heads.heads * head_dim, "query rows")
    per_group = heads.heads // heads.groups
    runs: list[_Run] = []
    for group in range(heads.groups):
        own = range(group * per_group, (group + 1) * per_group)
        runs += _merged(
            _Run(0, (head * slots + slot) * head_dim, head_dim)
            for slot in range(slots)
            for head in own
        )
        runs.append(_Run(1, group * head_dim, head_dim))
        runs.append(_Run(2, group * (value // heads.groups), value // heads.groups))
    return runs


def _merged(runs: Iterable[_Run]) -> list[_Run]:
    """Join runs of one HF tensor that follow each other there."""
    joined: list[_Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last is not None and last.first + last.rows == run.first:
            joined[-1] = _Run(run.part, last.first, last.rows + run.rows)
        else:
            joined.append(run)
    return joined


def _blocks(shard: Shard, extent: int, size: int, what: str) -> int:
    """`extent` / `size`, which must be whole."""
    if extent % size:
        raise SourceError(
            f"{shard.name}: {extent} {what} do not divide by {size}",
            remedy="check the parallel sizes given and that the config is this model's",
        )
    return extent // size


_RUNS: dict[Rows, Callable[[Shard, Sequence[Shape], Heads | None], list[_Run]]] = {
    Rows.PLAIN: _plain_runs,
    Rows.GATED: _gated_runs,
    Rows.QKV: _qkv_runs,
}
