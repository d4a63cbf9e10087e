"""The gate's series say what the scheduler said, once, however many processes tell them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from engine_plugins.admin.shared_state import create_runtime_dir
from engine_plugins.prefill_gate.decision import OUTCOMES
from engine_plugins.prefill_gate.entry import EntryLimits, GateBoard
from engine_plugins.prefill_gate.gate_report import GateReport, GateSettings, LineReport
from engine_plugins.prefill_gate.metrics import GateMetrics
from tests.support.engine_server import ROOT

NAME = "engine_plugins_prefill_gate"
LIMITS = EntryLimits(enforced=True, largest_prompt=1, largest_with_logprobs=1)
REPORT = GateReport(
    settings=GateSettings(mode="enforce", cap_bytes=None, margin_quantile=0.99, margin_bytes=7),
    used_bytes=1000,
    cap_bytes=5000,
    calibration={
        "layers": LineReport(
            samples=8, intercept_bytes=1, slope=1.5, proven=True, error_p95=0.015, margin_bytes=64
        )
    },
    decisions={**dict.fromkeys(OUTCOMES, 0), "run": 5, "too_large": 2},
    exceeded=3,
    waiting=4,
    longest_wait_s=1.5,
    deferred_s=2.5,
    cleared_steps=9,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A server's runtime directory."""
    path = tmp_path / "runtime"
    create_runtime_dir(path)
    return path


@pytest.fixture
def board(folder: Path) -> GateBoard:
    """The scheduler's side of it."""
    return GateBoard(folder)


def series(text: str) -> dict[str, float]:
    """The gate's lines of a scrape."""
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(NAME))
    found = {name.removeprefix(NAME + "_"): float(value) for name, value in lines}
    return {name: value for name, value in found.items() if "_created" not in name}


def test_every_series_of_a_report(folder: Path, board: GateBoard) -> None:
    """As Prometheus reads them; an outcome that never was is there as 0."""
    registry = CollectorRegistry()
    metrics = GateMetrics(folder, registry)
    board.publish(LIMITS, REPORT)
    metrics.refresh()
    text = generate_latest(registry).decode()
    assert series(text) == {
        'mode{mode="off"}': 0,
        'mode{mode="observe"}': 0,
        'mode{mode="enforce"}': 1,
        "used_bytes": 1000,
        "cap_bytes": 5000,
        "waiting": 4,
        "longest_wait_seconds": 1.5,
        'prediction_error_ratio{regime="layers"}': 0.015,
        'margin_bytes{regime="layers"}': 64,
        **{f'decisions_total{{outcome="{outcome}"}}': 0 for outcome in OUTCOMES},
        'decisions_total{outcome="run"}': 5,
        'decisions_total{outcome="too_large"}': 2,
        "deferred_seconds_total": 2.5,
        "exceeded_total": 3,
        "cleared_steps_total": 9,
    }
    assert f"# TYPE {NAME}_decisions_total counter" in text


def test_before_the_scheduler_has_spoken_nothing_is_told(folder: Path) -> None:
    """A gate of which nothing is known has no 0 decisions."""
    registry = CollectorRegistry()
    metrics = GateMetrics(folder, registry)
    metrics.refresh()
    assert not any("decisions" in name for name in series(generate_latest(registry).decode()))


def test_what_is_known_is_not_counted_again(folder: Path, board: GateBoard) -> None:
    """Not by repeating, and not by the next word of the scheduler."""
    registry = CollectorRegistry()
    metrics = GateMetrics(folder, registry)
    for run in (5, 5, 6):
        board.publish(LIMITS, _report(run))
        metrics.refresh()
        metrics.refresh()
    assert series(generate_latest(registry).decode())['decisions_total{outcome="run"}'] == 6


def test_a_counter_never_falls_when_the_gate_is_reset(folder: Path, board: GateBoard) -> None:
    """It goes on by what is counted from then on."""
    registry = CollectorRegistry()
    metrics = GateMetrics(folder, registry)
    counted = []
    for run in (9, 0, 2, 3):
        board.publish(LIMITS, _report(run))
        metrics.refresh()
        counted.append(series(generate_latest(registry).decode())['decisions_total{outcome="run"}'])
    assert counted == [9, 9, 11, 12]


TELLER = """
import sys, time
from pathlib import Path
import engine_plugins.prefill_gate.metrics as told
from engine_plugins.prefill_gate.entry import GateBoard
assert "prometheus_client" not in sys.modules
import os
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[2]
runtime, last = Path(sys.argv[1]), int(sys.argv[3])
metrics, board = told.GateMetrics(runtime), GateBoard(runtime)
print("ready", flush=True)
while (status := board.read()) is None or status.report.decisions["run"] < last:
    metrics.refresh()
metrics.refresh()
"""


@pytest.fixture
def tellers(folder: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Three processes that look at the board all the time, until it says 200."""
    stored = tmp_path / "prometheus"
    stored.mkdir()
    command = [sys.executable, "-c", TELLER, str(folder), str(stored), "200"]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    yield started
    for teller in started:
        teller.kill()
        teller.communicate()


def test_several_processes_together_count_each_decision_once(
    board: GateBoard, tellers: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """A scrape adds up the counters of all, and takes the newest of each gauge."""
    from prometheus_client import multiprocess

    for teller in tellers:
        assert teller.stdout is not None
        assert teller.stdout.readline() == "ready\n"
    for run in range(1, 201):
        board.publish(LIMITS, msgspec.structs.replace(_report(run), waiting=run))
        time.sleep(0.001)
    assert [teller.wait(60) for teller in tellers] == [0, 0, 0]
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(tmp_path / "prometheus"))
    told = series(generate_latest(registry).decode())
    assert told['decisions_total{outcome="run"}'] == 200
    assert told['decisions_total{outcome="too_large"}'] == 2
    assert told["deferred_seconds_total"] == 2.5
    assert told["waiting"] == 200
    assert len(os.listdir(tmp_path / "prometheus")) >= 6


KEPT_UP = """
import sys, time
from pathlib import Path
from engine_plugins.prefill_gate.metrics import tell_gate_metrics
for _ in range(2):
    tell_gate_metrics(Path(sys.argv[1]))
from prometheus_client import REGISTRY
while REGISTRY.get_sample_value(sys.argv[2]) != float(sys.argv[3]):
    time.sleep(0.01)
"""


def test_a_process_keeps_its_series_up_to_date_by_itself(folder: Path, board: GateBoard) -> None:
    """Begun before the scheduler has spoken, and begun twice."""
    command = [sys.executable, "-c", KEPT_UP, str(folder), f"{NAME}_exceeded_total", "3"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        board.publish(LIMITS, REPORT)
        assert process.wait(60) == 0


def _report(run: int) -> GateReport:
    return msgspec.structs.replace(REPORT, decisions={**REPORT.decisions, "run": run})
