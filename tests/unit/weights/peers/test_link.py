"""What a link gives is told from a few MiB, and a fabric that fell back to TCP is warned of."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from engine_plugins.errors import PeerLostError, TransferTimeoutError
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.peers import link
from engine_plugins.weights.peers.link import measure_link, measure_links
from engine_plugins.weights.peers.meeting import meet
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.base import PreparedTransfer
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from engine_plugins.weights.transport.nixl import NixlTransport
from engine_plugins.weights.transport.quarantine import quarantined_bytes
from engine_plugins.weights.transport.transfers import run_transfers
from tests.support.source_ranks import SourceRank, offered_tensors

MIB = 1 << 20


@pytest.fixture
def engine() -> Iterator[InMemoryTransport]:
    transport = InMemoryTransport("engine")
    yield transport
    transport.close()


@pytest.fixture
def trainer(engine: InMemoryTransport) -> Iterator[SourceRank]:
    """A source of 16 MiB in one piece and one of a few bytes, met."""
    tensors = {"norm": torch.zeros(8), "w": torch.zeros(4 * MIB)}
    with offered_tensors(tensors) as rank:
        meet(engine, rank.manifest)
        yield rank


def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the reads that are run from now on."""
    sizes: list[int] = []

    def counted(transfers: list[PreparedTransfer], *, deadline_s: float) -> int:
        sizes.extend(transfer.nbytes for transfer in transfers)
        return run_transfers(transfers, deadline_s=deadline_s)

    monkeypatch.setattr(link, "run_transfers", counted)
    return sizes


def test_a_fast_link_is_measured_with_at_most_8_mib(
    engine: InMemoryTransport, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doubling reads of the largest region; nothing of them stays registered."""
    monkeypatch.setattr(link, "BUDGET_S", 60.0)
    sizes = read_bytes(monkeypatch)
    report = measure_link(engine, trainer.manifest)
    assert sizes == [64 << 10 << n for n in range(7)]
    assert sum(sizes) < 8 * MIB
    assert report.source == trainer.manifest.source
    assert report.nbytes in sizes
    assert report.gbps is not None
    assert report.gbps > 0
    assert engine._regions.rows() == []


def test_a_slow_link_is_measured_with_what_the_budget_allows(
    engine: InMemoryTransport, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 4 MB/s 64 KiB take 16 ms, and 256 KiB are not begun; the figure never flatters."""
    sizes = read_bytes(monkeypatch)
    trainer.transport.bytes_per_s = 4e6
    report = measure_link(engine, trainer.manifest)
    assert sizes[0] == 64 << 10
    assert len(sizes) <= 2
    assert report.gbps is not None
    assert report.gbps <= 0.004


def test_a_source_with_little_memory_tells_nothing(engine: InMemoryTransport) -> None:
    """Its reads would show the time of one read, not the link."""
    with offered_tensors({"w": torch.zeros(1000)}) as rank:
        meet(engine, rank.manifest)
        report = measure_link(engine, rank.manifest)
    assert (report.nbytes, report.gbps) == (0, None)


def test_one_warning_for_all_links_that_smell_of_tcp(
    engine: InMemoryTransport,
    trainer: SourceRank,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It names the slowest, what was expected, and UCX's settings as they are."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    monkeypatch.setattr(link, "ALL_LINKS_S", 60.0)
    trainer.transport.bytes_per_s = 4e6
    with caplog.at_level(logging.INFO):
        reports = measure_links(engine, [trainer.manifest] * 2, expected_gbps=40)
    assert len(reports) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert said.startswith("2 of 2 links give far less than the 40 GB/s")
    assert trainer.manifest.source in said
    assert "UCX_TLS=tcp, UCX_NET_DEVICES unset" in said


@pytest.mark.parametrize("expected", [None, 0.001])
def test_what_is_expected_or_not_asked_for_is_only_told(
    engine: InMemoryTransport,
    trainer: SourceRank,
    caplog: pytest.LogCaptureFixture,
    expected: float | None,
) -> None:
    with caplog.at_level(logging.INFO):
        measure_links(engine, [trainer.manifest], expected_gbps=expected)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert trainer.manifest.source in record.getMessage()


def test_many_slow_links_are_not_all_measured(
    engine: InMemoryTransport, trainer: SourceRank
) -> None:
    """The whole has a budget too: a job may have hundreds of ranks."""
    trainer.transport.bytes_per_s = 1e6
    assert 1 <= len(measure_links(engine, [trainer.manifest] * 50, expected_gbps=None)) < 50


def test_a_source_that_stops_loses_us_a_buffer_and_is_named(
    engine: InMemoryTransport, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As everywhere, memory that late bytes may reach is never used again."""
    monkeypatch.setattr(link, "PATIENCE_S", 0.05)
    trainer.transport.bytes_per_s = 0
    before = quarantined_bytes()
    with pytest.raises(TransferTimeoutError, match=trainer.manifest.agent):
        measure_link(engine, trainer.manifest)
    assert quarantined_bytes() == before + link.LARGEST_READ_BYTES


def test_a_source_that_died_is_named(engine: InMemoryTransport, trainer: SourceRank) -> None:
    trainer.transport.close()
    with pytest.raises(PeerLostError, match=trainer.manifest.agent):
        measure_link(engine, trainer.manifest)
    assert engine._regions.rows() == []


@pytest.mark.nixl
def test_a_nixl_link_is_measured_over_the_wire() -> None:
    """Two agents, real memory."""
    trainer, engine = NixlTransport("link-trainer"), NixlTransport("link-engine")
    source = WeightSource(hf_boxes({"w": torch.ones(MIB)}), trainer)
    try:
        manifest: SourceManifest = source.manifest
        meet(engine, manifest)
        report = measure_link(engine, manifest)
    finally:
        source.close()
        engine.close()
        trainer.close()
    assert report.gbps is not None
    assert report.gbps > 0
    assert report.nbytes >= 64 << 10
