"""Which of the sources that hold the same box gives it to a rank.

`balanced`: that which has least to give so far. `nearest`: a source on the rank's own machine
where one has the box, balanced among equals. `same_rank`: for fabrics whose rails do not reach each
other, only sources whose global rank is the rank's own, modulo the engine's ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from engine_plugins.errors import PlanError, SettingsError
from engine_plugins.settings import SOURCE_POLICIES
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.planning.box_table import Column, TensorTable
from engine_plugins.weights.planning.source_table import SourceTable

__all__ = ["Reader", "SourceChoice", "balanced"]

_NEAR, _FAR, _UNREACHABLE = range(3)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The engine rank that reads, and how it chooses.

    Attributes:
        policy: one of `SOURCE_POLICIES`.
        host: its machine, as manifests name theirs; empty is near to nobody.
        tp_rank, tp_size: which rank it is, and of how many.
    """

    policy: str = "balanced"
    host: str = ""
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        if self.policy not in SOURCE_POLICIES:
            raise SettingsError(
                f"there is no source policy {self.policy!r}; there are: "
                f"{', '.join(SOURCE_POLICIES)}"
            )

    def distance(self, manifest: SourceManifest) -> int:
        """How far a source is: near, far, or out of reach."""
        if self.policy == "nearest":
            return _NEAR if self.host and manifest.host == self.host else _FAR
        if self.policy == "same_rank":
            rank = manifest.global_rank
            same = rank is not None and rank % self.tp_size == self.tp_rank
            return _NEAR if same else _UNREACHABLE
        return _NEAR


@dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """A reader's choice among the sources of a plan.

    Attributes:
        reader: who reads.
        manifests: of the sources, in the order of the source table's numbers.
    """

    reader: Reader
    manifests: Sequence[SourceManifest]

    def of(
        self, sources: SourceTable, tensors: TensorTable, given: Column, nbytes: Column
    ) -> tuple[Column, Column]:
        """Choose one of each box's replicas.

        Args:
            sources: what all sources hold.
            tensors: the tensors that it speaks of.
            given: [n] distinct boxes of the sources that are read, by number.
            nbytes: [n] bytes that are read of each.

        Returns:
            [n] number of the source, and [n] row of the box in its manifest.

        Raises:
            PlanError: no source in the rank's reach has the box; the text names tensor and rank.
        """
        read = np.zeros(len(sources.distinct), np.bool_)
        read[given] = True
        boxes = np.flatnonzero(read)
        among = read.cumsum()[given] - 1
        first, source, row = sources.replicas(boxes)
        distances = np.fromiter(map(self.reader.distance, self.manifests), np.int64)
        distance = distances[source]
        if len(boxes) and distance.any():
            least = np.minimum.reduceat(distance, first[:-1])
            lost = np.flatnonzero(least[among] == _UNREACHABLE)
            if len(lost):
                box, replicas = among[lost[0]], slice(*first[among[lost[0]] :][:2].tolist())
                self._refuse(sources, tensors, int(boxes[box]), source[replicas])
            kept = distance == np.repeat(least, np.diff(first))
            first = np.concatenate([[0], kept.cumsum()])[first]
            source, row = source[kept], row[kept]
        chosen = balanced(first, source, among, nbytes)
        return source[chosen], row[chosen]

    def _refuse(
        self, sources: SourceTable, tensors: TensorTable, box: int, offering: Column
    ) -> NoReturn:
        reader, boxes = self.reader, sources.distinct
        tensor = tensors.tensors[int(boxes.tensor[box])]
        own = slice(tensors.axes - len(tensor.shape), None)
        start, shape = (tuple(table[box, own].tolist()) for table in (boxes.start, boxes.shape))
        named = ", ".join(
            f"{each.source} (global rank {each.global_rank})"
            for each in (self.manifests[number] for number in offering[:4].tolist())
        )
        more = f" and {len(offering) - 4} more" if len(offering) > 4 else ""
        raise PlanError(
            f"{tensor.name}: rank {reader.tp_rank} of {reader.tp_size} may read only from global "
            f"ranks that are {reader.tp_rank} modulo {reader.tp_size} (source policy same_rank), "
            f"and none of them offers the box at {start} of shape {shape}, which {named}{more} "
            "would give",
            remedy="place replicas so that every rail has each box or, where rails do reach each "
            "other, set ENGINE_PLUGINS_SOURCE_POLICY to balanced or nearest",
        )


def balanced(first: Column, source: Column, given: Column, nbytes: Column) -> Column:
    """[n] rows, each of that source among a box's which has least to give so far.

    Args:
        first: [m + 1] where each box's rows begin.
        source: [rows] number of the source, ascending within each box.
        given: [n] boxes that are read, by number.
        nbytes: [n] bytes that are read of each.

    Boxes that one source alone has come first. Those that the same sources have share a heap of
    them; an entry whose source has since got more elsewhere is corrected when it comes up.
    """
    begin, end = first[given], first[given + 1]
    chosen: Column = begin.copy()
    contested = end - begin > 1
    alone = np.zeros(int(source.max(initial=0)) + 1, np.int64)
    np.add.at(alone, source[begin[~contested]], nbytes[~contested])
    loads = alone.tolist()
    heaps: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    rows = np.flatnonzero(contested)
    columns = (begin[rows], end[rows], nbytes[rows], _marks(first, source)[given[rows]])
    places: list[int] = []
    for low, high, size, mark in zip(*(column.tolist() for column in columns), strict=True):
        heap = heaps.get((mark, high - low))
        if heap is None:
            who = source[low:high].tolist()
            heap = [(loads[one], place, one) for place, one in enumerate(who)]
            heapify(heap)
            heaps[mark, high - low] = heap
        load, place, one = heap[0]
        while load != loads[one]:
            heapreplace(heap, (loads[one], place, one))
            load, place, one = heap[0]
        loads[one] = load = load + size
        heapreplace(heap, (load, place, one))
        places.append(low + place)
    chosen[rows] = places
    return chosen


def _marks(first: Column, source: Column) -> npt.NDArray[np.uint64]:
    """[m] numbers that are equal where boxes have the same sources, and almost never otherwise."""
    each = np.random.default_rng(0).integers(2**64, size=int(source.max(initial=0)) + 1, dtype="u8")
    marks: npt.NDArray[np.uint64] = np.add.reduceat(each[source], first[:-1])
    return marks
