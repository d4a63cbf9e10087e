"""The prefill gate as Prometheus series, told by the API processes from what the scheduler says."""

from __future__ import annotations

import fcntl
import functools
import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine_plugins.errors import EnginePluginError
from engine_plugins.prefill_gate.entry import GateBoard, GateStatus
from engine_plugins.prefill_gate.gate_report import GateReport
from engine_plugins.settings import GATE_MODES
from engine_plugins.shared_page import SharedPage

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["GateMetrics", "tell_gate_metrics"]

REFRESH_S = 1.0
"""As often as the scheduler says anything."""
_PAGE_BYTES = 4096

logger = logging.getLogger(__name__)


class GateMetrics:
    """The series of one API process.

    All processes set the same gauges, and the newest of each counts. Counters of several processes
    are added up by whoever reads them: of what the scheduler has counted each part is told once, by
    the process that takes it.

    Args:
        runtime_dir: of the server.
        registry: where the engine's own metrics are; by default the client library's.

    As for residual memory, prometheus_client must not be imported before an engine has said how it
    stores values.
    """

    def __init__(self, runtime_dir: Path, registry: CollectorRegistry | None = None) -> None:
        import prometheus_client as prometheus

        registry = registry or prometheus.REGISTRY
        name = "engine_plugins_prefill_gate"
        self._board = GateBoard(runtime_dir)
        self._told = _Told(runtime_dir / "gate")
        self._seen: GateStatus | None = None

        def gauge(suffix: str, text: str, labels: Iterable[str] = ()) -> prometheus.Gauge:
            return prometheus.Gauge(
                f"{name}_{suffix}",
                text,
                labels,
                registry=registry,
                multiprocess_mode="mostrecent",
            )

        def counter(suffix: str, text: str, labels: Iterable[str] = ()) -> prometheus.Counter:
            return prometheus.Counter(f"{name}_{suffix}", text, labels, registry=registry)

        self._mode = gauge("mode", "1 for the mode that is in force.", ("mode",))
        self._used = gauge("used_bytes", "Of the rank with the least room, before its last step.")
        self._cap = gauge("cap_bytes", "What must not be exceeded.")
        self._waiting = gauge("waiting", "Requests that wait for memory.")
        self._longest = gauge("longest_wait_seconds", "Of the first of them.")
        self._error = gauge(
            "prediction_error_ratio",
            "95th percentile of a phase's measured steps: distance from what is predicted.",
            ("regime",),
        )
        self._margin = gauge("margin_bytes", "On top of a phase's prediction.", ("regime",))
        self._decisions = counter("decisions", "Prefills judged, by outcome.", ("outcome",))
        self._cleared = counter(
            "cleared_steps",
            "Steps that ran unasked: the largest such step would have fitted twice.",
        )
        self._deferred = counter("deferred_seconds", "Waited by requests that were let in.")
        self._exceeded = counter("exceeded", "Steps that took more than predicted with margin.")

    def refresh(self) -> None:
        """Take over what the scheduler said last; nothing if that is known.

        Raises:
            EnginePluginError: a page of the runtime directory is spoiled.
            OSError: the runtime directory has gone.
        """
        if self._board.read() is self._seen:
            return
        with self._told.locked():
            status = self._board.read()  # not older than what whoever had the lock has seen
            if status is not None:
                self._count(status.report)
                self._set(status.report)
            self._seen = status

    def _set(self, report: GateReport) -> None:
        for mode in GATE_MODES:
            self._mode.labels(mode).set(mode == report.settings.mode)
        self._used.set(report.used_bytes)
        self._cap.set(report.cap_bytes)
        self._waiting.set(report.waiting)
        self._longest.set(report.longest_wait_s)
        for regime, line in report.calibration.items():
            self._error.labels(regime).set(line.error_p95)
            self._margin.labels(regime).set(line.margin_bytes)

    def _count(self, report: GateReport) -> None:
        growth = self._told.growth(
            {
                **{str(outcome): float(count) for outcome, count in report.decisions.items()},
                "cleared_steps": report.cleared_steps,
                "deferred_s": report.deferred_s,
                "exceeded": report.exceeded,
            }
        )
        for outcome in report.decisions:
            self._decisions.labels(outcome).inc(growth[outcome])
        self._cleared.inc(growth["cleared_steps"])
        self._deferred.inc(growth["deferred_s"])
        self._exceeded.inc(growth["exceeded"])


class _Told:
    """How far all processes together have told the scheduler's counts."""

    def __init__(self, folder: Path) -> None:
        self._lock, self._path = folder / "told.lock", folder / "told.page"
        self._page: SharedPage | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the other processes out."""
        with self._lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def growth(self, totals: dict[str, float]) -> dict[str, float]:
        """What nobody has told yet, which is told from now on. A count that shrank began anew."""
        if self._page is None:
            SharedPage.create(self._path, nbytes=_PAGE_BYTES)
            self._page = SharedPage(self._path)
        _, body = self._page.read()
        told = msgspec.msgpack.decode(body, type=dict[str, float]) if body else {}
        self._page.write(msgspec.msgpack.encode(totals))
        return {
            name: total if total < told.get(name, 0) else total - told.get(name, 0)
            for name, total in totals.items()
        }


@functools.cache
def tell_gate_metrics(runtime_dir: Path) -> None:
    """Keep this process's series up to date, from a thread; repeating it does nothing."""
    threading.Thread(
        target=_keep_telling, args=(runtime_dir,), name="prefill-gate-metrics", daemon=True
    ).start()


def _keep_telling(runtime_dir: Path) -> None:
    board, waiting = GateBoard(runtime_dir), threading.Event()
    try:
        while board.read() is None:
            waiting.wait(REFRESH_S)
        metrics = GateMetrics(runtime_dir)
        while True:
            metrics.refresh()
            waiting.wait(REFRESH_S)
    except (OSError, EnginePluginError) as error:
        logger.warning("the series of the prefill gate stand still from now on: %s", error)
