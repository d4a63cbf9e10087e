"""What is resident of an engine: samples, rows of ranks and the verdict, as plain data.

They travel as msgpack from the workers and go out as JSON. A figure that is not known is `None`
with a reason, never 0.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine_plugins.sleep.process_identity import ProcessIdentity

__all__ = [
    "Baseline",
    "DeviceResidual",
    "GpuDevice",
    "MemorySample",
    "MemorySource",
    "Quality",
    "RankMemoryRow",
    "Reason",
    "ResidualPolicy",
    "ResidualReport",
    "Rung",
    "Settled",
    "Verdict",
]

MemorySource = Literal["cgroup", "nvml", "allocator", "whole_gpu", "nvidia_smi", "process"]
"""Who gave a figure; `process` is the kernel's account of a process's host memory."""

Quality = Literal["exact", "lower_bound", "upper_bound", "unknown"]

Verdict = Literal["pass", "fail", "unknown"]

ResidualPolicy = Literal["enforce", "guard", "observe"]
"""What an unknown does: it refuses, it is judged by its upper bound, or nothing ever refuses."""

Reason = Literal[
    "",
    # A source could not be asked.
    "no_dmem",
    "cgroup_shared",
    "nvml_missing",
    "nvml_symbol_missing",
    "nvml_error",
    "gpu_lost",
    "gpu_not_found",
    "no_permission",
    "not_supported",
    "mig",
    "nvidia_smi_missing",
    "nvidia_smi_failed",
    "allocator_only",
    "whole_gpu_only",
    "counts_file_pages",
    "probe_failed",
    "no_source",
    # It answered, and the answer is not the rank's memory.
    "not_available",
    "zero_bytes",
    "no_match",
    "partly_unknown",
    "foreign_pids",
    "other_namespace",
    "no_bus_id",
    # The process is not the one that was meant.
    "process_gone",
    "pid_reused",
    # What stands in the way of a verdict, or makes it.
    "not_settled",
    "no_baseline",
    "baseline_not_comparable",
    "no_rows",
    "over_threshold",
    "over_baseline",
]
"""Stable codes, also the label of metrics. Empty where nothing needs to be said."""


class GpuDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU by the names that the driver knows it by."""

    uuid: str
    """As NVML spells it: `GPU-` and the number."""
    pci_address: str = ""
    """As sysfs spells it: `0000:1a:00.0`; empty if not known."""


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """What one source of the ladder gave, for diagnosis."""

    source: MemorySource
    resident_bytes: int | None = None
    quality: Quality = "unknown"
    reason: Reason = ""
    detail: str = ""
    group: str = ""
    """As `MemorySample.group`."""


class MemorySample(msgspec.Struct, frozen=True, kw_only=True):
    """One probe of one rank on its device.

    The truth lies between `at_least_bytes` and `at_most_bytes`.
    """

    resident_bytes: int | None
    """The figure, `None` if unknown."""
    source: MemorySource | None
    quality: Quality
    reason: Reason = ""
    """Why the figure is not exact."""
    detail: str = ""
    """The same for people: what was seen."""
    at_least_bytes: int = 0
    at_most_bytes: int | None = None
    group: str = ""
    """Ranks of one device whose samples name the same group measured the same memory: it counts
    once. Empty for a process's own."""
    probe_s: float = 0.0
    rungs: list[Rung] = []
    """Every source that was asked, best first."""


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """The last of the samples taken until memory stood still, or the deadline passed."""

    sample: MemorySample
    settled: bool
    seconds: float
    """From the first probe to the answer, probes included."""
    samples: int


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank held with its context and communicators, before weights."""

    resident_bytes: int
    source: MemorySource
    quality: Quality


class RankMemoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One rank on one device, as its worker reports it."""

    tp_rank: int
    process: ProcessIdentity
    device: GpuDevice | None
    """`None` on the CPU platform: the device is the worker process itself."""
    sample: MemorySample
    settle_s: float = 0.0
    """Seconds until memory stood still; 0 for a single probe."""
    settled: bool = True
    """False if the deadline passed while memory still moved."""
    baseline: Baseline | None = None
    kept_bytes: int = 0
    """Bytes that stay by design: a tag that nobody asked to release, or memory that this platform
    cannot release. They are taken off before a threshold is applied."""
    components: dict[str, int] = {}
    """Parts of the figure that the engine side knows, by name; they need not add up to it."""
    quarantined_bytes: int = 0
    """Host memory that broken updates have lost until nothing can come into it any more."""


class DeviceResidual(msgspec.Struct, frozen=True, kw_only=True):
    """All ranks of one device together, and what follows."""

    device: str
    """A GPU's uuid, or `cpu:<tp_rank>`."""
    tp_ranks: list[int]
    resident_bytes: int | None
    """The best figure, `None` if nothing is known."""
    at_least_bytes: int
    at_most_bytes: int | None
    quality: Quality
    sources: list[MemorySource]
    baseline_bytes: int | None
    """`None` unless every rank has a baseline that its figure compares with."""
    residual_bytes: int | None
    """Resident bytes over the baseline, less what is kept by design."""
    kept_bytes: int
    verdict: Verdict
    reason: Reason
    detail: str


class ResidualReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is still resident of an engine, and whether that may be."""

    verdict: Verdict
    """Of the worst device."""
    reason: Reason
    detail: str
    policy: ResidualPolicy
    refused: bool
    """Whether the policy makes a refusal of the verdict."""
    threshold_bytes: int
    """Of a GPU; does not apply to host memory."""
    over_baseline_bytes: int
    """The threshold over the baseline, on any device."""
    worst_device: str | None
    devices: list[DeviceResidual]
    rows: list[RankMemoryRow]
    measured_at: float
    """Unix seconds."""
