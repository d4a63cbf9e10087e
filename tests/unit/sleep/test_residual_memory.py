"""What stays resident is summed within a GPU, the worst GPU decides, and unknown is no pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from engine_plugins.sleep.memory_report import (
    Baseline,
    MemorySample,
    RankMemoryRow,
    ResidualPolicy,
    ResidualReport,
)
from engine_plugins.sleep.process_identity import identify
from engine_plugins.sleep.residual_memory import assess
from tests.support.fake_nvml import GPU_A, GPU_B, Scene, build_nvml, run_scenes
from tests.support.memory_rows import GIB, exact, row, unknown

POLICIES: tuple[ResidualPolicy, ...] = ("enforce", "guard", "observe")


def judge(*rows: RankMemoryRow, policy: ResidualPolicy = "enforce") -> ResidualReport:
    return assess(
        rows,
        policy=policy,
        threshold_bytes=3 * GIB,
        over_baseline_bytes=1 * GIB,
        measured_at=1.0,
    )


def outcome(report: ResidualReport) -> tuple[str, str, bool]:
    return report.verdict, report.reason, report.refused


def test_ranks_of_one_gpu_add_up_and_gpus_do_not() -> None:
    """Two ranks of 2 GiB each: too much on one GPU, little enough on two."""
    first, second = row(exact(2)), row(exact(2), tp_rank=1)
    shared = judge(first, second)
    assert outcome(shared) == ("fail", "over_threshold", True)
    assert [(each.tp_ranks, each.resident_bytes) for each in shared.devices] == [([0, 1], 4 * GIB)]
    assert shared.detail == "4 GiB resident on GPU-a (ranks 0, 1); 3 GiB may be"

    apart = judge(first, msgspec.structs.replace(second, device=GPU_B))
    assert outcome(apart) == ("pass", "", False)
    assert [each.resident_bytes for each in apart.devices] == [2 * GIB, 2 * GIB]


def test_the_worst_gpu_decides_and_is_named() -> None:
    rows = [row(exact(1 + rank), tp_rank=rank, gpu=f"GPU-{rank}") for rank in range(4)]
    report = judge(*rows)
    assert outcome(report) == ("fail", "over_threshold", True)
    assert report.worst_device == "GPU-3"
    assert [each.verdict for each in report.devices] == ["pass", "pass", "pass", "fail"]


def test_memory_that_ranks_measured_together_counts_once() -> None:
    """A cgroup's figure is that of every rank in it."""
    rows = [row(exact(2, "cgroup", "cgroup:/engine"), tp_rank=rank) for rank in range(2)]
    report = judge(*rows)
    assert outcome(report) == ("pass", "", False)
    assert report.devices[0].resident_bytes == 2 * GIB
    other = row(exact(2, "cgroup", "cgroup:/another"), tp_rank=2)
    assert judge(*rows, other).devices[0].resident_bytes == 4 * GIB


@pytest.mark.parametrize(
    ("sample", "verdicts"),
    [
        # In each policy, the verdict and whether it refuses.
        pytest.param(
            exact(2.9), [("pass", False), ("pass", False), ("pass", False)], id="exact, under"
        ),
        pytest.param(
            exact(3.1), [("fail", True), ("fail", True), ("fail", False)], id="exact, over"
        ),
        pytest.param(
            unknown(), [("unknown", True), ("unknown", False), ("unknown", False)], id="nothing"
        ),
        pytest.param(
            unknown(whole_gpu=2.9),
            [("pass", False), ("pass", False), ("pass", False)],
            id="the whole GPU holds less",
        ),
        pytest.param(
            unknown(whole_gpu=40),
            [("unknown", True), ("fail", True), ("unknown", False)],
            id="the whole GPU holds more",
        ),
        pytest.param(
            unknown(at_least=1),
            [("unknown", True), ("unknown", False), ("unknown", False)],
            id="at least a little",
        ),
        pytest.param(
            unknown(at_least=3.1, whole_gpu=40),
            [("fail", True), ("fail", True), ("fail", False)],
            id="at least too much",
        ),
    ],
)
def test_what_each_policy_makes_of_what_is_known(
    sample: MemorySample, verdicts: list[tuple[str, bool]]
) -> None:
    reports = [judge(row(sample), policy=policy) for policy in POLICIES]
    assert [(each.verdict, each.refused) for each in reports] == verdicts
    for report in reports:
        if report.verdict == "unknown":
            assert report.reason == "zero_bytes"
            assert "0 bytes for [7]" in report.detail


def test_one_rank_of_many_that_is_not_known_makes_no_pass() -> None:
    """Its neighbour's gigabyte is a lower bound, not the sum."""
    report = judge(row(exact(1)), row(unknown(whole_gpu=40), tp_rank=1))
    assert outcome(report) == ("unknown", "zero_bytes", True)
    (device,) = report.devices
    assert (device.resident_bytes, device.quality) == (GIB, "lower_bound")
    assert (device.at_least_bytes, device.at_most_bytes) == (GIB, 40 * GIB)


def test_nobody_who_reports_is_unknown() -> None:
    assert outcome(judge()) == ("unknown", "no_rows", True)


def test_growth_over_the_baseline_fails_below_the_threshold() -> None:
    report = judge(row(exact(2.5), baseline=0.5))
    assert outcome(report) == ("fail", "over_baseline", True)
    assert report.detail == "2 GiB over the baseline on GPU-a (ranks 0); 1 GiB may be"
    (device,) = report.devices
    assert (device.baseline_bytes, device.residual_bytes) == (GIB // 2, 2 * GIB)
    assert outcome(judge(row(exact(2.5), baseline=1.6))) == ("pass", "", False)


def test_without_a_baseline_a_gpu_is_held_to_the_threshold_alone() -> None:
    """And the report says so: the residual over it is null."""
    first, second = row(exact(1), baseline=0.8), row(exact(1), tp_rank=1)
    (device,) = judge(first, second).devices
    assert (device.verdict, device.baseline_bytes, device.residual_bytes) == ("pass", None, None)


def test_a_baseline_that_was_measured_otherwise_is_not_compared_with() -> None:
    bound = Baseline(resident_bytes=GIB, source="nvml", quality="lower_bound")
    elsewhere = Baseline(resident_bytes=GIB, source="cgroup", quality="exact")
    for baseline in (bound, elsewhere):
        (device,) = judge(row(exact(2.5), taken=baseline)).devices
        assert (device.verdict, device.baseline_bytes) == ("pass", None)
    # A bound lies on one side of any exact baseline's sum, whoever measured that.
    (device,) = judge(row(unknown(at_least=2.5), taken=elsewhere)).devices
    assert (device.verdict, device.reason) == ("fail", "over_baseline")


def test_host_memory_is_held_to_its_baseline_and_not_to_a_gpus_threshold() -> None:
    """A worker of 20 GiB may sleep well; ranks on one host are not added up."""
    rows = [row(exact(20.5, "process"), tp_rank=rank, gpu=None, baseline=20.0) for rank in range(4)]
    report = judge(*rows)
    assert outcome(report) == ("pass", "", False)
    assert [each.device for each in report.devices] == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
    grown = row(exact(21.5, "process"), gpu=None, baseline=20.0)
    assert outcome(judge(grown)) == ("fail", "over_baseline", True)


def test_host_memory_without_a_comparable_baseline_is_unknown() -> None:
    lacking = row(exact(1, "process"), gpu=None)
    assert outcome(judge(lacking)) == ("unknown", "no_baseline", True)
    assert outcome(judge(lacking, policy="guard")) == ("unknown", "no_baseline", False)
    bound = Baseline(resident_bytes=GIB, source="process", quality="upper_bound")
    other = row(exact(1, "process"), gpu=None, taken=bound)
    assert outcome(judge(other))[:2] == ("unknown", "baseline_not_comparable")


def test_what_is_kept_by_design_is_taken_off() -> None:
    """Weights that nobody asked to release are not a leak."""
    kept = row(exact(16.5), baseline=0.3, kept_bytes=15 * GIB + GIB // 2)
    report = judge(kept)
    assert outcome(report) == ("pass", "", False)
    assert report.devices[0].kept_bytes == 15 * GIB + GIB // 2
    assert report.devices[0].resident_bytes == int(16.5 * GIB)
    assert outcome(judge(row(exact(16.5))))[0] == "fail"


@pytest.mark.parametrize("held", [1, 5])
def test_memory_that_still_moves_is_neither_pass_nor_fail(held: float) -> None:
    moving = row(exact(held), settled=False, settle_s=5.0)
    assert outcome(judge(moving)) == ("unknown", "not_settled", True)
    assert judge(moving).detail == "the memory of ranks [0] still moved after 5.0 s"
    guarded = judge(moving, policy="guard")
    assert guarded.verdict == ("pass" if held < 3 else "fail")
    assert guarded.reason == "not_settled"


def test_a_report_travels_whole() -> None:
    report = judge(row(exact(1), baseline=0.5), row(unknown(whole_gpu=9), tp_rank=1))
    packed = msgspec.msgpack.encode(report)
    assert msgspec.msgpack.decode(packed, type=ResidualReport) == report
    told = json.loads(msgspec.json.encode(report))
    assert told["rows"][1]["sample"]["rungs"][0]["resident_bytes"] is None
    assert msgspec.convert(told, ResidualReport) == report


# A whole engine under a fake NVML, its workers real processes.


def four_ranks_on_two_gpus(scene: Scene) -> Sequence[RankMemoryRow]:
    rows = []
    for rank in range(4):
        device = (GPU_A, GPU_B)[rank % 2]
        worker = scene.child()
        scene.process(worker, GIB + rank * GIB // 4, device=device)
        memory = scene.memory(device, rank, worker=identify(worker))
        rows.append(memory.row(memory.sample()))
    scene.process(1, 30 * GIB)
    return rows


def the_same_with_one_rank_that_is_not_told(scene: Scene) -> Sequence[RankMemoryRow]:
    rows = list(four_ranks_on_two_gpus(scene))
    worker = scene.child()
    scene.process(worker, 0, device=GPU_B)
    memory = scene.memory(GPU_B, 4, worker=identify(worker))
    return [*rows, memory.row(memory.sample())]


def in_json(rows: Sequence[RankMemoryRow]) -> object:
    return msgspec.to_builtins(rows)


def test_an_engine_over_several_gpus(tmp_path: Path) -> None:
    scenes = [four_ranks_on_two_gpus, the_same_with_one_rank_that_is_not_told]
    names = [each.__name__ for each in scenes]
    library = build_nvml(tmp_path)
    answers = run_scenes(in_json, names, library=library, namespace=False)
    known, partly = (msgspec.convert(answers[name], list[RankMemoryRow]) for name in names)

    report = judge(*known)
    assert {each.device: each.resident_bytes for each in report.devices} == {
        "GPU-a": 5 * GIB // 2,
        "GPU-b": 3 * GIB,
    }
    assert outcome(report) == ("pass", "", False)

    report = judge(*partly)
    assert outcome(report) == ("unknown", "zero_bytes", True)
    assert report.worst_device == "GPU-b"
    assert outcome(judge(*partly, policy="guard"))[:2] == ("fail", "zero_bytes")
