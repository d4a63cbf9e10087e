"""Engines feed engines: what lies in live parameters is a source like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import msgspec
import pytest
import torch

from engine_plugins.errors import ConflictError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.loader.destination import DestinationBox
from engine_plugins.weights.receiving.peer_source import peer_boxes
from tests.support.in_memory_model import InMemoryModel, hf_tensors
from tests.support.in_memory_rank import InMemoryRank
from tests.support.source_ranks import SourceRank, offered_tensors

FACTS: dict[str, str | int | bool] = {"model_type": "tiny", "hidden_size": 16}


class Engine:
    """The ranks of one engine, updated together."""

    def __init__(self, ranks: Sequence[InMemoryRank]) -> None:
        self.ranks = ranks
        self._connected: list[bytes] = []

    def update(self, manifests: Sequence[bytes]) -> int:
        """Connect where the sources are others than before, update; the bytes moved."""
        if list(manifests) != self._connected:
            self._connected = list(manifests)
            offers = [msgspec.msgpack.decode(each, type=SourceManifest) for each in manifests]
            for rank in self.ranks:
                rank.receiver.connect("plan", offers)
        for rank in self.ranks:
            rank.receiver.start("plan", staged=False, timeout_s=10)
        return sum(rank.install_all().bytes_moved for rank in self.ranks)

    def manifests(self) -> list[bytes]:
        return [rank.receiver.manifest(FACTS, 7) for rank in self.ranks]

    def serves(self, seed: int) -> bool:
        """Whether every rank is bit for bit a fresh start with these weights."""
        return all(
            rank.model.equals(
                InMemoryModel.loaded(
                    hf_tensors(seed=seed), tp_rank=tp_rank, tp_size=len(self.ranks)
                )
            )
            for tp_rank, rank in enumerate(self.ranks)
        )


@contextmanager
def engine(tp_size: int) -> Iterator[Engine]:
    """An engine that was started with the weights of seed 0."""
    with ExitStack() as stack:
        ranks = []
        for tp_rank in range(tp_size):
            model = InMemoryModel.loaded(hf_tensors(seed=0), tp_rank=tp_rank, tp_size=tp_size)
            ranks.append(InMemoryRank(model, tp_rank=tp_rank, direct_landing=True))
            stack.callback(ranks[-1].close)
        yield Engine(ranks)


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    """A trainer that offers the weights of seed 1."""
    with offered_tensors(hf_tensors(seed=1)) as made:
        yield made


@pytest.mark.parametrize(("parent_size", "child_size"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_an_engine_that_was_updated_feeds_another(
    trainer: SourceRank, parent_size: int, child_size: int
) -> None:
    """Of the same and of other sizes; fused, transposed and padded parameters among its own."""
    with engine(parent_size) as parent, engine(child_size) as child:
        parent.update([trainer.source.manifest_bytes])
        child.update(parent.manifests())
        assert child.serves(seed=1)
        assert parent.serves(seed=1)


def test_a_chain_of_engines_hands_on_what_the_trainer_gave_once(trainer: SourceRank) -> None:
    """Update by update: the manifests stay the same, so that plans are kept, and the bytes new."""
    with engine(2) as first, engine(1) as second, engine(2) as third:
        seen = set()
        for seed in (1, 2, 3):
            trainer.hold(hf_tensors(seed=seed))
            first.update([trainer.source.manifest_bytes])
            second.update(first.manifests())
            third.update(second.manifests())
            assert third.serves(seed=seed)
            seen.add((*first.manifests(), *second.manifests()))
        assert len(seen) == 1


def test_an_engine_that_was_not_updated_offers_nothing(trainer: SourceRank) -> None:
    """Nor one that is in the middle of an update."""
    with engine(1) as one:
        receiver = one.ranks[0].receiver
        receiver.connect("plan", [trainer.manifest])
        with pytest.raises(ConflictError, match=r"embed: .*not yet compared"):
            receiver.manifest(FACTS, 7)
        one.update([trainer.source.manifest_bytes])
        receiver.manifest(FACTS, 7)
        receiver.start("plan", staged=False, timeout_s=10)
        with pytest.raises(ConflictError, match="in the middle of an update"):
            receiver.manifest(FACTS, 7)


def test_a_manifest_says_who_offers_and_what(trainer: SourceRank) -> None:
    """The engine's own facts, each box once, and no padding."""
    with engine(1) as one:
        one.update([trainer.source.manifest_bytes])
        manifest = msgspec.msgpack.decode(one.manifests()[0], type=SourceManifest)
        agents = [transport.agent for transport in one.ranks[0].transports]
    assert manifest.model == FACTS
    assert manifest.source.startswith("engine rank 0 (")
    assert manifest.agent == agents[-1] != agents[0]
    assert sorted(manifest.tensors.names) == sorted(hf_tensors(seed=0))
    assert manifest.box_count == len(manifest.tensors.names)
    row = manifest.tensors.names.index("model.embed.weight")
    boxes = map(manifest.box, range(manifest.box_count))
    assert [box.shape for box in boxes if box.tensor == row] == [(50, 16)]


@dataclass
class Layout:
    """What a rank knows of its live parameters."""

    reasons: Mapping[str, str]
    held: Sequence[tuple[DestinationBox, torch.Tensor]] = ()

    def places(self) -> Sequence[tuple[DestinationBox, torch.Tensor]]:
        return self.held


def test_parameters_that_hold_something_else_are_named() -> None:
    """Cast, packed or computed: a peer would take them for the checkpoint's."""
    reasons = {f"layers.{n}.mlp": "w is cast from float32 to bfloat16" for n in range(6)}
    with pytest.raises(ConflictError) as caught:
        peer_boxes(Layout(reasons=reasons), [])
    assert "layers.0.mlp: w is cast from float32 to bfloat16" in caught.value.message
    assert "(and 2 more modules)" in caught.value.message


def test_a_box_that_two_parameters_hold_is_offered_once() -> None:
    data = torch.arange(6.0).reshape(2, 3)
    box = DestinationBox("w", (0, 0), (2, 3), "a.weight", 0, (3, 1))
    held = [(box, data), (box._replace(parameter="b.weight"), data.clone())]
    tensors = [LogicalTensor(name="w", shape=(4, 3), dtype=torch.float32)]
    (offered,) = peer_boxes(Layout(reasons={}, held=held), tensors)
    assert offered.data is data
    assert offered.global_shape == (4, 3)
