"""Several sources make one sample: the first exact figure, or what lies between bounds."""

from __future__ import annotations

from engine_plugins.sleep.memory_ladder import sample_of
from engine_plugins.sleep.memory_report import MemorySample, Rung

NO_DMEM = Rung(source="cgroup", reason="no_dmem", detail="no such file")
SILENT = Rung(source="nvml", reason="zero_bytes", detail="0 bytes for [7]")
SHARED = Rung(
    source="cgroup",
    resident_bytes=30,
    quality="upper_bound",
    reason="cgroup_shared",
    detail="process 9 is not the engine's",
    group="cgroup:/pod",
)
ALLOCATOR = Rung(
    source="allocator", resident_bytes=10, quality="lower_bound", reason="allocator_only"
)
WHOLE = Rung(
    source="whole_gpu",
    resident_bytes=90,
    quality="upper_bound",
    reason="whole_gpu_only",
    group="gpu",
)


def test_an_exact_figure_needs_no_bounds() -> None:
    exact = Rung(source="nvml", resident_bytes=5, quality="exact")
    rungs = [NO_DMEM, exact, ALLOCATOR, WHOLE]
    sample = sample_of(rungs, probe_s=0.5)
    assert sample == MemorySample(
        resident_bytes=5,
        source="nvml",
        quality="exact",
        at_least_bytes=5,
        at_most_bytes=5,
        probe_s=0.5,
        rungs=rungs,
    )


def test_bounds_from_both_sides_and_the_reason_of_the_best_source_that_was_there() -> None:
    sample = sample_of([NO_DMEM, SILENT, ALLOCATOR, WHOLE])
    assert (sample.resident_bytes, sample.source, sample.quality) == (
        10,
        "allocator",
        "lower_bound",
    )
    assert (sample.at_least_bytes, sample.at_most_bytes, sample.group) == (10, 90, "gpu")
    assert (sample.reason, sample.detail) == ("zero_bytes", "0 bytes for [7]")


def test_the_tightest_upper_bound_holds() -> None:
    sample = sample_of([SHARED, SILENT, WHOLE])
    assert (sample.resident_bytes, sample.source, sample.quality) == (30, "cgroup", "upper_bound")
    assert (sample.at_least_bytes, sample.at_most_bytes, sample.group) == (0, 30, "cgroup:/pod")


def test_nothing_known_is_unknown_and_not_0() -> None:
    for rungs, reason in (
        ([NO_DMEM, SILENT], "zero_bytes"),
        ([NO_DMEM], "no_source"),
        ([], "no_source"),
    ):
        sample = sample_of(rungs)
        assert (sample.resident_bytes, sample.source, sample.quality) == (None, None, "unknown")
        assert (sample.reason, sample.at_most_bytes) == (reason, None)
