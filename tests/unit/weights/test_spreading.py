"""Short rows go where they belong in few copies, and live memory is found without a search."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_plugins.errors import TransportError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.memory.live_memory import LiveMemory
from engine_plugins.weights.planning.plan import build_plan
from engine_plugins.weights.planning.plan_data import PackedPiece, PieceForm
from engine_plugins.weights.receiving import receive_buffer
from engine_plugins.weights.receiving.prepared_fetch import PreparedFetch
from engine_plugins.weights.receiving.spreading import Run, runs_of
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fetched import fetched
from tests.support.source_ranks import offered_boxes

pytestmark = pytest.mark.core

_agents = count()
FORMS = [
    PieceForm(torch.float32, (2, 8), (slice(0, 2), slice(3, 5)), (32, 4)),
    PieceForm(torch.float32, (1, 8), (slice(0, 1), slice(0, 2)), (32, 4)),
]


def experts(number: int, rows: int = 6, columns: int = 64) -> dict[str, torch.Tensor]:
    """Matrices of which a rank wants a few columns, by name."""
    return {
        f"experts.{expert}.down_proj.weight": torch.randn(rows, columns) for expert in range(number)
    }


@given(
    st.lists(st.tuples(st.sampled_from(FORMS), st.integers(0, 40), st.integers(0, 40)), max_size=24)
)
def test_runs_are_the_same_pieces(drawn: list[tuple[PieceForm, int, int]]) -> None:
    """None is lost, none comes twice, and each stays with its place."""
    pieces = [PackedPiece(0, -1, 0, 8, 4 * a, 4 * b, form) for form, a, b in drawn]
    runs = [one for run in runs_of(pieces) for one in run.singles()]
    key = lambda form, scratch, target: (id(form), scratch, target)  # noqa: E731
    assert sorted(key(run.form, run.scratch, run.target) for run in runs) == sorted(
        key(piece.form, piece.scratch_offset, piece.target) for piece in pieces
    )


def test_a_layers_experts_are_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 experts cut by columns: two forms that take turns, two copies."""
    seen: list[list[Run]] = []

    def noting(pieces: list[PackedPiece]) -> list[Run]:
        seen.append(runs_of(pieces))
        return seen[-1]

    monkeypatch.setattr(receive_buffer, "runs_of", noting)
    tensors = {**experts(64), **{f"s.{name}": data for name, data in experts(64, rows=3).items()}}
    names = [
        name for pair in zip(list(tensors)[:64], list(tensors)[64:], strict=True) for name in pair
    ]
    boxes = [
        SourceBox(
            name=name, global_shape=tuple(tensors[name].shape), start=(0, 0), data=tensors[name]
        )
        for name in names
    ]
    needed = {name: (((0, 16), (len(tensors[name]), 8)),) for name in names}
    engine = InMemoryTransport(f"engine-{next(_agents)}")
    with offered_boxes(boxes) as ranks:
        manifests = [ranks[0].manifest]
        logical = [
            LogicalTensor(name=name, shape=tuple(tensors[name].shape), dtype=torch.float32)
            for name in names
        ]
        plan = build_plan(manifests, [(["layer"], logical)], needed)
        pieces = sum(map(len, plan.steps[0].packed))
        fetch = PreparedFetch(plan, manifests, engine, staged=True)
        for _ in range(2):
            fetch.run_steps(range(1), stall_timeout_s=5, deadline=1e12, cancelled=lambda: False)
        held = dict(fetch.tensors(0))
        for name in names:
            assert torch.equal(held[name][:, 16:24], tensors[name][:, 16:24])
        fetch.close()
    engine.close()
    assert pieces == 128
    assert len(seen) == len(plan.steps[0].packed), "worked out once, whatever is fetched later"
    assert sum(map(len, seen)) <= 2 * len(seen) + 2


def test_pieces_of_several_storages_are_copied_apart() -> None:
    """Even distances by chance, between parameters that were allocated one by one."""
    tensors = experts(5)
    boxes = [
        SourceBox(name=name, global_shape=(6, 64), start=(0, 0), data=data)
        for name, data in tensors.items()
    ]
    needed = dict.fromkeys(tensors, (((0, 5), (6, 3)),))
    got = fetched([boxes], needed)
    assert all(torch.equal(got[name][:, 5:8], tensors[name][:, 5:8]) for name in tensors)
    memory = LiveMemory([torch.empty(64), torch.empty(64)], InMemoryTransport("live"))
    start = memory.regions[0].address
    with pytest.raises(TransportError, match="no live parameter"):
        memory.strided(start, (2, 1), (memory.regions[1].address - start, 4), torch.float32)
    memory.close()


@given(st.lists(st.integers(1, 64), min_size=1, max_size=12), st.data())
def test_live_memory_is_found_where_it_is(sizes: list[int], data: st.DataObject) -> None:
    """Whatever storages there are, views of one buffer among them; past an end there is none."""
    buffer = bytearray(4096)
    tensors = [torch.arange(float(size)) for size in sizes]
    tensors.append(torch.frombuffer(buffer, dtype=torch.float32))
    tensors.append(torch.frombuffer(memoryview(buffer)[256:1024], dtype=torch.float32))
    tensors[-2].copy_(torch.arange(1024.0))
    agent = InMemoryTransport(f"engine-{next(_agents)}")
    memory = LiveMemory(tensors, agent)
    tensor = data.draw(st.sampled_from(tensors))
    first = data.draw(st.integers(0, len(tensor) - 1))
    extent = data.draw(st.integers(1, len(tensor) - first))
    found = memory.strided(tensor.data_ptr() + 4 * first, (extent,), (4,), torch.float32)
    assert found.data_ptr() == tensor.data_ptr() + 4 * first
    assert torch.equal(found, tensor[first : first + extent])
    last = max(tensors[:-2], key=lambda each: each.data_ptr())
    with pytest.raises(TransportError, match="no live parameter"):
        memory.strided(last.data_ptr(), (len(last) + 1,), (4,), torch.float32)
    memory.close()
    with pytest.raises(TransportError, match="no live parameter"):
        memory.strided(tensor.data_ptr(), (1,), (4,), torch.float32)
    agent.close()
