"""The series of a report: what is not known has no value, and no engine's metrics are disturbed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from engine_plugins.sleep.leak_watch import LeakTrend
from engine_plugins.sleep.memory_report import RankMemoryRow, ResidualReport
from engine_plugins.sleep.metrics import ResidualMetrics
from engine_plugins.sleep.residual_memory import assess
from tests.support.memory_rows import GIB, exact, row, unknown

NAME = "engine_plugins_residual_memory"
PROJECT = Path(__file__).parents[3]


def judged(*rows: RankMemoryRow) -> ResidualReport:
    return assess(
        rows,
        policy="observe",
        threshold_bytes=3 * GIB,
        over_baseline_bytes=2 * GIB,
        measured_at=0.0,
    )


def values(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """By the values of the labels."""
    return {
        tuple(sample.labels.values()): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == f"{NAME}_{name}"
    }


def test_every_series_of_a_report() -> None:
    registry = CollectorRegistry()
    metrics = ResidualMetrics(registry)
    rows = [
        row(
            exact(1.5),
            tp_rank=rank,
            baseline=0.5,
            settle_s=0.2,
            kept_bytes=GIB // 4,
            components={"cuda_graph": GIB},
        )
        for rank in range(2)
    ]
    trend = LeakTrend(device="GPU-a", cycles=16, slope_bytes=64.0, leaking=True)
    metrics.record(judged(*rows), [trend])
    assert values(registry, "resident_bytes") == {("GPU-a",): 3 * GIB}
    assert values(registry, "baseline_bytes") == {("GPU-a",): GIB}
    assert values(registry, "bytes") == {("GPU-a",): 1.5 * GIB}
    assert values(registry, "component_bytes") == {
        ("GPU-a", "kept"): GIB / 2,
        ("GPU-a", "cuda_graph"): 2 * GIB,
    }
    assert values(registry, "verdicts_total") == {("pass", "none"): 1}
    assert values(registry, "settle_seconds_count") == {(): 2}
    assert values(registry, "settle_seconds_sum") == {(): pytest.approx(0.4)}
    assert values(registry, "unknowns_total") == {}
    assert values(registry, "leak_slope_bytes") == {("GPU-a",): 64.0}
    assert values(registry, "leaking") == {("GPU-a",): 1}


def test_verdicts_and_unknowns_are_counted_by_reason() -> None:
    registry = CollectorRegistry()
    metrics = ResidualMetrics(registry)
    metrics.record(judged(row(exact(4))))
    for _ in range(2):
        metrics.record(judged(row(unknown())))
    metrics.record(judged())
    assert values(registry, "verdicts_total") == {
        ("fail", "over_threshold"): 1,
        ("unknown", "zero_bytes"): 2,
        ("unknown", "no_rows"): 1,
    }
    assert values(registry, "unknowns_total") == {("zero_bytes",): 2}


def test_what_becomes_unknown_is_not_left_at_its_last_value_nor_at_0() -> None:
    registry = CollectorRegistry()
    metrics = ResidualMetrics(registry)
    metrics.record(judged(row(exact(2), baseline=0.5)))
    metrics.record(judged(row(unknown())))
    for name in ("resident_bytes", "baseline_bytes", "bytes"):
        assert math.isnan(values(registry, name)["GPU-a",]), name


SERVER = """
import sys
import engine_plugins.sleep.metrics
assert "prometheus_client" not in sys.modules
import os
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
from tests.unit.sleep.test_metrics import ResidualMetrics, exact, judged, row
ResidualMetrics().record(judged(row(exact(float(sys.argv[2])))))
"""


def test_several_processes_of_a_server_tell_the_newest_figure(tmp_path: Path) -> None:
    """The directory is named after our modules are loaded, as engines do."""
    from prometheus_client import multiprocess

    for held in ("2", "1"):
        subprocess.run([sys.executable, "-c", SERVER, str(tmp_path), held], cwd=PROJECT, check=True)
    assert len(os.listdir(tmp_path)) >= 4
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(tmp_path))
    text = generate_latest(registry).decode()
    assert f'{NAME}_resident_bytes{{device="GPU-a"}} 1.073741824e+09' in text
    assert f'{NAME}_verdicts_total{{reason="none",verdict="pass"}} 2.0' in text
