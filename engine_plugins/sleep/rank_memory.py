"""The memory of one engine rank, measured in its own process: samples, settling, baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from engine_plugins.sleep.cgroup_memory import CGROUPS, cgroup_memory
from engine_plugins.sleep.gpu_processes import PidProof, attribute
from engine_plugins.sleep.memory_ladder import sample_of
from engine_plugins.sleep.memory_report import (
    Baseline,
    GpuDevice,
    MemorySample,
    MemorySource,
    Quality,
    RankMemoryRow,
    Reason,
    Rung,
    Settled,
)
from engine_plugins.sleep.nvidia_smi import smi_processes
from engine_plugins.sleep.nvml import Nvml
from engine_plugins.sleep.process_identity import ProcessIdentity, identify
from engine_plugins.sleep.process_memory import process_memory
from engine_plugins.sleep.process_tree import ProcessTree
from engine_plugins.sleep.settling import DEADLINE_S, settled

__all__ = ["RankMemory"]


class RankMemory:
    """Measures one rank. On the CPU platform the figure is this process's own resident memory.

    On a GPU the sources are asked best first, up to the first exact figure: the engine's cgroup,
    NVML, then bounds from the rank's allocator and from the whole GPU. nvidia-smi is started only
    where NVML cannot be loaded.

    Args:
        tp_rank: of the rank.
        device: its GPU; `None` on the CPU platform.
        allocator_bytes: what the rank's allocator knows to hold on the GPU, a lower bound.
        whole_gpu_bytes: what everybody holds on the GPU, an upper bound; asked where NVML does not
            say.
        worker: the rank's process, by default this one.
        engine: the server's first process. A cgroup is the engine's own if it holds nothing but
            processes below this one, or below the worker.
        proof: what makes listed pids the pids of this namespace.
        cgroups: where cgroup v2 is mounted.
    """

    def __init__(
        self,
        tp_rank: int,
        device: GpuDevice | None,
        *,
        allocator_bytes: Callable[[], int] | None = None,
        whole_gpu_bytes: Callable[[], int] | None = None,
        worker: ProcessIdentity | None = None,
        engine: ProcessIdentity | None = None,
        proof: PidProof | None = None,
        cgroups: Path = CGROUPS,
    ) -> None:
        self.tp_rank = tp_rank
        self.device = device
        self.processes = ProcessTree(worker or identify())
        self._engine = ProcessTree(engine) if engine else None
        self._allocator_bytes = allocator_bytes
        self._whole_gpu_bytes = whole_gpu_bytes
        self._proof = proof or PidProof()
        self._cgroups = cgroups
        self._nvml = Nvml()
        self._baseline: Baseline | None = None

    def take_baseline(self) -> Baseline | None:
        """Remember what is resident now: call it before weights, with context and communicators.

        `None` if that is not known; nothing is then compared with it.
        """
        now = self.sample()
        if now.resident_bytes is not None and now.source is not None:
            self._baseline = Baseline(
                resident_bytes=now.resident_bytes, source=now.source, quality=now.quality
            )
        return self._baseline

    def sample(self) -> MemorySample:
        """Probe once. Never raises: what goes wrong is the sample's reason."""
        began = time.perf_counter()
        rungs = list(_up_to_exact(self._rungs()))
        return sample_of(rungs, probe_s=time.perf_counter() - began)

    def settled(self, *, deadline_s: float = DEADLINE_S) -> Settled:
        """Probe until memory stands still."""
        return settled(self.sample, deadline_s=deadline_s)

    def row(
        self,
        measured: Settled | MemorySample,
        *,
        kept_bytes: int = 0,
        components: Mapping[str, int] | None = None,
        quarantined_bytes: int = 0,
    ) -> RankMemoryRow:
        """What the rank reports: see `RankMemoryRow`."""
        if isinstance(measured, MemorySample):
            measured = Settled(sample=measured, settled=True, seconds=0.0, samples=1)
        return RankMemoryRow(
            tp_rank=self.tp_rank,
            process=self.processes.root,
            device=self.device,
            sample=measured.sample,
            settle_s=measured.seconds,
            settled=measured.settled,
            baseline=self._baseline,
            kept_bytes=kept_bytes,
            components=dict(components or {}),
            quarantined_bytes=quarantined_bytes,
        )

    def _rungs(self) -> Iterator[Rung]:
        pid = self.processes.root_pid()
        if self.device is None:
            yield self._host_memory(pid)
            return
        if pid is not None:
            yield cgroup_memory(pid, self.device, ours=self._is_ours, root=self._cgroups)
        listing = self._nvml.processes(self.device)
        yield attribute(listing, self.processes, self._proof)
        if self._allocator_bytes is not None:
            yield _bound("allocator", "lower_bound", "allocator_only", self._allocator_bytes)
        whole = self._nvml.whole_gpu(self.device)
        if whole.resident_bytes is None and self._whole_gpu_bytes is not None:
            whole = _bound("whole_gpu", "upper_bound", "whole_gpu_only", self._whole_gpu_bytes)
        yield whole
        if listing.reason in ("nvml_missing", "nvml_symbol_missing"):
            yield attribute(smi_processes(self.device), self.processes, self._proof)

    def _host_memory(self, pid: int | None) -> Rung:
        if pid is not None:
            return process_memory(pid)
        reason, detail = self.processes.absence()
        return Rung(source="process", reason=reason, detail=detail)

    def _is_ours(self, pid: int) -> bool:
        trees = (self.processes, self._engine)
        return any(tree is not None and tree.sight(pid) != "foreign" for tree in trees)


def _up_to_exact(rungs: Iterator[Rung]) -> Iterator[Rung]:
    for rung in rungs:
        yield rung
        if rung.quality == "exact":
            return


def _bound(source: MemorySource, quality: Quality, reason: Reason, ask: Callable[[], int]) -> Rung:
    """What a function of the engine's side says, which must not end a probe."""
    try:
        nbytes = ask()
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return Rung(source=source, reason="probe_failed", detail=detail)
    if quality == "upper_bound" and nbytes <= 0:
        return Rung(source=source, reason="zero_bytes", detail="0 bytes, which cannot be")
    group = "gpu" if source == "whole_gpu" else ""
    return Rung(source=source, resident_bytes=nbytes, quality=quality, reason=reason, group=group)
