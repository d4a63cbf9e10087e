"""Residual memory as Prometheus series, fed from reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from engine_plugins.sleep.leak_watch import LeakTrend
from engine_plugins.sleep.memory_report import ResidualReport
from engine_plugins.sleep.residual_memory import device_of

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["ResidualMetrics"]

_SETTLE_BUCKETS_S = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class ResidualMetrics:
    """The series of one process; among several API processes the newest value of each counts.

    Args:
        registry: where the engine's own metrics are; by default the client library's.

    prometheus_client decides how it stores values when it is first imported, by a variable that
    engines set late. So it is imported here, not with this module.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        import prometheus_client as prometheus

        registry = registry or prometheus.REGISTRY
        name = "engine_plugins_residual_memory"

        def gauge(suffix: str, text: str, labels: Iterable[str]) -> prometheus.Gauge:
            return prometheus.Gauge(
                f"{name}_{suffix}",
                text,
                labels,
                registry=registry,
                multiprocess_mode="mostrecent",
            )

        self._resident = gauge("resident_bytes", "Held by a device's ranks.", ("device",))
        self._baseline = gauge("baseline_bytes", "Held before weights.", ("device",))
        self._residual = gauge(
            "bytes", "Held over the baseline and what is kept by design.", ("device",)
        )
        self._parts = gauge(
            "component_bytes", "Parts of it that the engine side knows.", ("device", "component")
        )
        self._slope = gauge(
            "leak_slope_bytes", "Growth of what stays resident, by sleep cycle.", ("device",)
        )
        self._leaking = gauge("leaking", "1 where what stays resident keeps growing.", ("device",))
        self._verdicts = prometheus.Counter(
            f"{name}_verdicts", "Verdicts by reason.", ("verdict", "reason"), registry=registry
        )
        self._unknowns = prometheus.Counter(
            f"{name}_unknowns", "Samples without a figure.", ("reason",), registry=registry
        )
        self._settle = prometheus.Histogram(
            f"{name}_settle_seconds",
            "Seconds until a rank's memory stood still.",
            registry=registry,
            buckets=_SETTLE_BUCKETS_S,
        )

    def record(self, report: ResidualReport, trends: Iterable[LeakTrend] = ()) -> None:
        """Take one report in; `trends` where it was made asleep. What is not known is not 0."""
        self._verdicts.labels(report.verdict, report.reason or "none").inc()
        for row in report.rows:
            if row.settle_s:
                self._settle.observe(row.settle_s)
            if row.sample.resident_bytes is None:
                self._unknowns.labels(row.sample.reason).inc()
        for device in report.devices:
            self._resident.labels(device.device).set(_value(device.resident_bytes))
            self._baseline.labels(device.device).set(_value(device.baseline_bytes))
            self._residual.labels(device.device).set(_value(device.residual_bytes))
            self._parts.labels(device.device, "kept").set(device.kept_bytes)
        for (device_name, component), nbytes in _components(report).items():
            self._parts.labels(device_name, component).set(nbytes)
        for trend in trends:
            self._slope.labels(trend.device).set(trend.slope_bytes)
            self._leaking.labels(trend.device).set(trend.leaking)


def _value(nbytes: int | None) -> float:
    """Not a number where nothing is known, which Prometheus shows as no value."""
    return math.nan if nbytes is None else float(nbytes)


def _components(report: ResidualReport) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for row in report.rows:
        for component, nbytes in row.components.items():
            total[device_of(row), component] += nbytes
    return total
