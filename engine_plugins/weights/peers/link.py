"""What the link to a source gives, measured once when it is met.

NIXL falls back to TCP without a word, and an update then takes hundreds of times as long as it
should. A few MiB of the source's own registered memory show it before the first update does.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine_plugins.errors import TransferTimeoutError
from engine_plugins.weights.contract.manifest import SourceManifest, numbers
from engine_plugins.weights.memory.arena import Arena
from engine_plugins.weights.transport.base import PreparedTransfer, Transport
from engine_plugins.weights.transport.regions import HOST
from engine_plugins.weights.transport.transfers import run_transfers

__all__ = ["LinkReport", "measure_link", "measure_links"]

logger = logging.getLogger(__name__)

FIRST_READ_BYTES = 64 << 10
LARGEST_READ_BYTES = 4 << 20
"""Reads double from the first to the largest: 8 MiB in all."""
SMALLEST_REGION_BYTES = 1 << 20
"""A source without so much in one piece shows how long a read takes, not what the link gives."""
BUDGET_S = 0.05
"""Of one link: no read is begun that would end later."""
ALL_LINKS_S = 0.2
PATIENCE_S = 2.0
SUSPICIOUS_SHARE = 4
"""Less than one part in so many of what is expected is another kind of wire, not a busy one."""


@dataclass(frozen=True, kw_only=True)
class LinkReport:
    """The fastest read of a measurement.

    Attributes:
        source: the source's name in its manifest.
        nbytes: bytes of that read; 0 if the source has too little to tell.
        seconds: how long it took.
    """

    source: str
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def gbps(self) -> float | None:
        """Gigabytes (1e9) per second, or None if the source has too little to tell."""
        return self.nbytes / 1e9 / self.seconds if self.nbytes else None


def measure_links(
    transport: Transport, manifests: Sequence[SourceManifest], *, expected_gbps: float | None
) -> list[LinkReport]:
    """Measure the links to sources that were met, in turn, for `ALL_LINKS_S` at most.

    Logs what they give, as one warning if any gives less than a quarter of what is expected.

    Args:
        transport: reads; every source is its peer already.
        manifests: of the sources.
        expected_gbps: gigabytes per second that each link should give; None expects nothing.

    Returns:
        A report of each source that was measured, in their order; the last ones may be missing.

    Raises:
        PeerLostError: a source died.
        TransferTimeoutError: a source gave nothing for `PATIENCE_S`.
    """
    until = time.monotonic() + ALL_LINKS_S
    reports: list[LinkReport] = []
    for manifest in manifests:
        if time.monotonic() >= until:
            break
        reports.append(measure_link(transport, manifest))
    _tell(reports, expected_gbps)
    return reports


def measure_link(transport: Transport, manifest: SourceManifest) -> LinkReport:
    """Read from the source's largest region, ever more, and report the fastest read.

    Takes about `BUDGET_S`, longer only if the first 64 KiB do; moves 8 MiB at most.

    Raises:
        PeerLostError: the source died.
        TransferTimeoutError: it gave nothing for `PATIENCE_S`.
    """
    sizes = numbers(manifest.regions.nbytes)
    if sizes.max(initial=0) < SMALLEST_REGION_BYTES:
        return LinkReport(source=manifest.source)
    largest = int(sizes.argmax())
    address = int(numbers(manifest.regions.addresses)[largest])
    limit = min(LARGEST_READ_BYTES, int(sizes[largest]))
    arena = Arena(limit, transport)
    reads: list[PreparedTransfer] = []
    size = FIRST_READ_BYTES
    try:
        while size <= limit:
            row = [arena.address, address, size]
            reads.append(
                transport.prepare_read(
                    manifest.agent,
                    np.array([row], dtype=np.uint64),
                    local_device=HOST,
                    remote_device=int(numbers(manifest.regions.devices)[largest]),
                )
            )
            size *= 2
        fastest = _fastest(reads)
    except TransferTimeoutError as error:
        if error.stuck:
            reads = []  # released they would say no more of themselves
            arena.quarantine()
        raise
    finally:
        for read in reads:
            read.release()
        arena.close()
    return LinkReport(source=manifest.source, nbytes=fastest[0], seconds=fastest[1])


def _fastest(reads: Sequence[PreparedTransfer]) -> tuple[int, float]:
    """Bytes and seconds of the fastest read, as far as the budget goes."""
    began = time.perf_counter()
    timed: list[tuple[int, float]] = []
    for read in reads:
        before = time.perf_counter()
        if timed and before - began + 2 * timed[-1][1] > BUDGET_S:
            break
        run_transfers([read], deadline_s=PATIENCE_S)
        timed.append((read.nbytes, time.perf_counter() - before))
    return max(timed, key=lambda each: each[0] / each[1])


def _tell(reports: Sequence[LinkReport], expected_gbps: float | None) -> None:
    measured = sorted((report.gbps, report.source) for report in reports if report.gbps is not None)
    if not measured:
        return
    slowest = f"{measured[0][0]:.3g} GB/s from {measured[0][1]}"
    wires = ", ".join(
        f"{name}={os.environ[name]}" if name in os.environ else f"{name} unset"
        for name in ("UCX_TLS", "UCX_NET_DEVICES")
    )
    slow = [gbps for gbps, _ in measured if gbps < (expected_gbps or 0) / SUSPICIOUS_SHARE]
    if not slow:
        logger.info("links to %d sources: at least %s (%s)", len(measured), slowest, wires)
        return
    logger.warning(
        "%d of %d links give far less than the %g GB/s that ENGINE_PLUGINS_EXPECTED_LINK_GBPS "
        "expects, the slowest %s: this smells of TCP in place of RDMA (%s). Updates will take as "
        "much longer. Check that UCX_TLS allows rc, that UCX_NET_DEVICES names ports that are up, "
        "and what `ucx_info -d` shows on both hosts",
        len(slow),
        len(measured),
        expected_gbps,
        slowest,
        wires,
    )
