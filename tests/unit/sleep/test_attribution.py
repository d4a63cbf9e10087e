"""Whose memory it is that a driver tells: every row has a figure, a quality and a reason.

NVML is a library compiled for the tests, driven through NVIDIA's own Python bindings; processes and
pid namespaces are real. Above all, what is not known is never read as 0.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import msgspec
import pynvml
import pytest

from engine_plugins.sleep.gpu_processes import PidProof
from engine_plugins.sleep.memory_report import MemorySample
from engine_plugins.sleep.process_identity import identify, own_namespace
from tests.support.fake_nvml import (
    GPU_A,
    GPU_B,
    NOT_AVAILABLE,
    OWN_NAMESPACE,
    Scene,
    build_nvml,
    run_scenes,
)

GIB = 1 << 30
WHOLE = 40 * GIB
FOREIGN = 1
"""Pid 1 is no child of ours."""
LIST = "nvmlDeviceGetComputeRunningProcesses"
MEMORY = "nvmlDeviceGetMemoryInfo_v2"
ME = os.getpid()

# What the driver says of a process.


def it_says_how_much(scene: Scene) -> MemorySample:
    scene.process(ME, 2 * GIB)
    return scene.memory().sample()


def it_says_zero(scene: Scene) -> MemorySample:
    scene.process(ME, 0)
    return scene.memory().sample()


def it_says_not_available(scene: Scene) -> MemorySample:
    scene.process(ME, NOT_AVAILABLE)
    return scene.memory().sample()


def it_lists_daemons_without_memory_too(scene: Scene) -> MemorySample:
    scene.process(FOREIGN, 0)
    scene.process(FOREIGN, NOT_AVAILABLE, kind="mps")
    scene.process(ME, 2 * GIB)
    return scene.memory().sample()


def it_lists_others_only(scene: Scene) -> MemorySample:
    scene.process(FOREIGN, 2 * GIB)
    return scene.memory().sample()


def it_lists_nobody(scene: Scene) -> MemorySample:
    return scene.memory().sample()


def it_lists_a_process_twice_under_mps(scene: Scene) -> MemorySample:
    scene.process(ME, 2 * GIB)
    scene.process(ME, 2 * GIB, kind="mps")
    return scene.memory().sample()


def it_lists_a_process_under_mps_only(scene: Scene) -> MemorySample:
    scene.process(ME, 2 * GIB, kind="mps")
    return scene.memory().sample()


def it_lists_many_others(scene: Scene) -> MemorySample:
    for other in range(20):
        scene.process(2**21 + other, GIB)
    scene.process(ME, 2 * GIB)
    return scene.memory().sample()


def the_process_is_on_another_gpu_too(scene: Scene) -> MemorySample:
    scene.process(ME, 2 * GIB)
    scene.process(ME, 7 * GIB, device=GPU_B)
    return scene.memory().sample()


# Processes below the worker, and those that were.


def a_child_holds_memory(scene: Scene) -> MemorySample:
    scene.process(ME, 2 * GIB)
    scene.process(scene.child(), GIB)
    return scene.memory().sample()


def a_childs_memory_is_not_told(scene: Scene) -> MemorySample:
    scene.process(ME, 2 * GIB)
    scene.process(scene.child(), 0)
    return scene.memory().sample()


def a_child_is_listed_and_the_worker_is_not(scene: Scene) -> MemorySample:
    scene.process(scene.child(), GIB)
    return scene.memory().sample()


def a_child_lost_its_parent_after_it_was_seen(scene: Scene) -> MemorySample:
    _, pid, end_parent = scene.family()
    scene.process(ME, 2 * GIB)
    scene.process(pid, GIB)
    memory = scene.memory()
    memory.sample()
    end_parent()
    return memory.sample()


def a_worker_without_parent_is_the_worker(scene: Scene) -> MemorySample:
    _, pid, end_parent = scene.family()
    end_parent()
    scene.process(pid, 2 * GIB)
    return scene.memory(worker=identify(pid)).sample()


def a_child_vanished_and_is_still_listed(scene: Scene) -> MemorySample:
    child = scene.child()
    scene.process(ME, 2 * GIB)
    scene.process(child, GIB)
    memory = scene.memory()
    memory.sample()
    scene.end(child)
    return memory.sample()


def the_worker_vanished_and_is_still_listed(scene: Scene) -> MemorySample:
    child = scene.child()
    memory = scene.memory(worker=identify(child))
    scene.process(child, 2 * GIB)
    scene.end(child)
    return memory.sample()


# The driver does not answer, or the GPU is of a kind of its own.


def the_gpu_is_cut_by_mig(scene: Scene) -> MemorySample:
    scene.gpu(GPU_A, used=WHOLE, mig=True)
    scene.process(ME, 2 * GIB)
    return scene.memory().sample()


def the_gpu_is_a_mig_instance(scene: Scene) -> MemorySample:
    scene.gpu(GPU_A, used=WHOLE, mig=True)
    instance = msgspec.structs.replace(GPU_A, uuid="GPU-of-an-instance")
    return scene.memory(instance).sample()


def the_gpu_is_lost(scene: Scene) -> MemorySample:
    scene.fail("nvmlDeviceGetHandleByUUID", 15)
    return scene.memory().sample()


def the_gpu_is_lost_between_two_questions(scene: Scene) -> MemorySample:
    memory = scene.memory()
    scene.process(ME, 2 * GIB)
    memory.sample()
    scene.fail(LIST, 15)
    scene.fail(MEMORY, 15)
    return memory.sample()


def the_gpu_is_lost_and_cuda_knows_how_full_it_was(scene: Scene) -> MemorySample:
    scene.fail("nvmlDeviceGetHandleByUUID", 15)
    return scene.memory(whole_gpu_bytes=lambda: 30 * GIB).sample()


def the_gpu_is_not_there(scene: Scene) -> MemorySample:
    return scene.memory(msgspec.structs.replace(GPU_A, uuid="GPU-c", pci_address="")).sample()


def listing_is_not_permitted(scene: Scene) -> MemorySample:
    scene.fail(LIST, 4)
    return scene.memory().sample()


def listing_is_not_supported(scene: Scene) -> MemorySample:
    scene.fail(LIST, 3)
    return scene.memory().sample()


def listing_fails_otherwise(scene: Scene) -> MemorySample:
    scene.fail(LIST, 999)
    return scene.memory().sample()


def the_whole_gpu_is_said_to_hold_nothing(scene: Scene) -> MemorySample:
    scene.gpu(GPU_A, used=0)
    return scene.memory().sample()


def the_driver_is_not_loaded(scene: Scene) -> MemorySample:
    scene.fail("nvmlInitWithFlags", 9)
    return scene.memory().sample()


def others_closed_nvml(scene: Scene) -> MemorySample:
    """In this process; the next probe but one opens it again."""
    scene.process(ME, 2 * GIB)
    memory = scene.memory()
    memory.sample()
    with contextlib.suppress(pynvml.NVMLError):
        while True:
            pynvml.nvmlShutdown()
    assert memory.sample().reason == "nvml_error"
    return memory.sample()


# Bounds from the engine's side.


def the_allocator_knows_a_part(scene: Scene) -> MemorySample:
    return scene.memory(allocator_bytes=lambda: GIB).sample()


def the_allocator_cannot_be_asked(scene: Scene) -> MemorySample:
    return scene.memory(allocator_bytes=lambda: 1 // 0).sample()


# The kernel's own account.


def the_cgroup_is_the_engines(scene: Scene) -> MemorySample:
    lines = (f"drm/{GPU_A.pci_address}/vram0 {3 * GIB}", f"drm/{GPU_B.pci_address}/vram0 {GIB}")
    root = scene.cgroup(*lines, members=(ME, scene.child()))
    scene.process(ME, 0)
    return scene.memory(cgroups=root).sample()


def the_cgroup_holds_the_servers_first_process(scene: Scene) -> MemorySample:
    root = scene.cgroup(f"drm/{GPU_A.pci_address}/vram0 {3 * GIB}", members=(ME, os.getppid()))
    return scene.memory(cgroups=root, engine=identify(os.getppid())).sample()


def the_cgroup_is_shared(scene: Scene) -> MemorySample:
    root = scene.cgroup(f"drm/{GPU_A.pci_address}/vram0 {3 * GIB}", members=(ME, FOREIGN))
    scene.process(ME, 2 * GIB)
    return scene.memory(cgroups=root).sample()


def the_cgroup_is_shared_and_nvml_silent(scene: Scene) -> MemorySample:
    root = scene.cgroup(f"drm/{GPU_A.pci_address}/vram0 {3 * GIB}", members=(ME, FOREIGN))
    scene.process(ME, NOT_AVAILABLE)
    return scene.memory(cgroups=root).sample()


def the_cgroup_is_charged_nothing(scene: Scene) -> MemorySample:
    root = scene.cgroup(f"drm/{GPU_A.pci_address}/vram0 0", members=(ME,))
    scene.process(ME, 2 * GIB)
    return scene.memory(cgroups=root).sample()


def the_cgroup_does_not_know_the_gpu(scene: Scene) -> MemorySample:
    root = scene.cgroup(f"drm/{GPU_B.pci_address}/vram0 {GIB}", members=(ME,))
    scene.process(ME, NOT_AVAILABLE)
    return scene.memory(cgroups=root).sample()


# Pid namespaces.


def the_worker_is_in_a_namespace_below(scene: Scene) -> MemorySample:
    worker = scene.worker_below()
    assert worker.pid == 1
    scene.process(FOREIGN, 5 * GIB)
    memory = scene.memory(worker=worker)
    pid = memory.processes.root_pid()
    assert pid not in (None, 1)
    scene.process(pid or 0, 2 * GIB)
    return memory.sample()


def the_driver_lists_host_pids(scene: Scene) -> MemorySample:
    scene.open_device_file()
    scene.process(2**21, 2 * GIB)
    return scene.memory().sample()


def a_host_pid_is_ours_by_chance(scene: Scene) -> MemorySample:
    scene.open_device_file()
    scene.process(ME, 9 * GIB)
    scene.process(2**21, 2 * GIB)
    return scene.memory().sample()


def two_host_pids_are_pids_here_by_chance(scene: Scene) -> MemorySample:
    scene.open_device_file()
    scene.process(ME, 9 * GIB)
    scene.process(scene.child(), 2 * GIB)
    return scene.memory().sample()


def the_driver_translates_pids(scene: Scene) -> MemorySample:
    scene.open_device_file()
    scene.process(ME, 2 * GIB)
    return scene.memory().sample()


def the_driver_translates_pids_and_hides_others(scene: Scene) -> MemorySample:
    scene.open_device_file()
    scene.process(0, 7 * GIB)
    scene.process(ME, 2 * GIB)
    return scene.memory().sample()


def the_driver_translates_pids_and_says_zero(scene: Scene) -> MemorySample:
    scene.open_device_file()
    scene.process(ME, 0)
    return scene.memory().sample()


def the_worker_is_outside(scene: Scene) -> MemorySample:
    scene.open_device_file()
    scene.process(ME, 2 * GIB)
    return scene.memory(worker=scene.outside).sample()


def another_process_has_the_workers_pid(scene: Scene) -> MemorySample:
    pid = scene.child()
    worker = identify(pid)
    scene.end(pid)
    scene.process(scene.child_with_pid(pid), 2 * GIB)
    return scene.memory(worker=worker).sample()


def another_process_has_the_workers_pid_on_the_cpu(scene: Scene) -> MemorySample:
    pid = scene.child()
    memory = scene.memory(None, worker=identify(pid))
    assert memory.sample().source == "process"
    scene.end(pid)
    scene.child_with_pid(pid)
    return memory.sample()


def another_process_has_a_childs_pid(scene: Scene) -> MemorySample:
    scene.proof = PidProof(driver_namespace=own_namespace())
    worker, below, _ = scene.family()
    scene.process(worker, 2 * GIB)
    scene.process(below, GIB)
    memory = scene.memory(worker=identify(worker))
    assert memory.sample().resident_bytes == 3 * GIB
    scene.end(below)
    scene.child_with_pid(below)
    return memory.sample()


# Without NVML, nvidia-smi.


def there_is_no_nvml(scene: Scene) -> MemorySample:
    os.environ["PATH"] = str(scene.folder)
    return scene.memory().sample()


def nvidia_smi_lists_it(scene: Scene) -> MemorySample:
    scene.program("nvidia-smi", f"echo 00000000:1A:00.0, {ME}, 2048; echo 0:2A:00.0, {ME}, 512")
    return scene.memory(whole_gpu_bytes=lambda: WHOLE).sample()


def nvidia_smi_lists_it_without_figure(scene: Scene) -> MemorySample:
    scene.program("nvidia-smi", f"echo '00000000:1A:00.0, {ME}, [N/A]'")
    return scene.memory().sample()


def nvidia_smi_lists_nobody(scene: Scene) -> MemorySample:
    scene.program("nvidia-smi", "true")
    return scene.memory().sample()


def nvidia_smi_does_not_know_bus_ids(scene: Scene) -> MemorySample:
    refusal = (
        """case "$1" in *bus_id*) echo 'Field "gpu_bus_id" is not a valid field'; exit 2; esac"""
    )
    scene.program("nvidia-smi", f"{refusal}; echo {ME}, 2048; echo {ME}, 512; echo 1, 99999")
    return scene.memory().sample()


def nvidia_smi_fails(scene: Scene) -> MemorySample:
    scene.program("nvidia-smi", "echo no driver; exit 9")
    return scene.memory().sample()


def nvidia_smi_says_something_else(scene: Scene) -> MemorySample:
    scene.program("nvidia-smi", "echo all is well")
    return scene.memory().sample()


class Row(NamedTuple):
    """What a scene gives: the figure, who gave it, its quality, why it is not exact, its bounds."""

    scene: Callable[[Scene], MemorySample]
    figure: int | None
    source: str | None
    quality: str
    reason: str
    at_least: int = 0
    at_most: int | None = WHOLE


def exact(scene: Callable[[Scene], MemorySample], figure: int, source: str = "nvml") -> Row:
    return Row(scene, figure, source, "exact", "", figure, figure)


def bounded(scene: Callable[[Scene], MemorySample], reason: str, at_most: int = WHOLE) -> Row:
    """Nothing but what the whole GPU holds is known."""
    return Row(scene, at_most, "whole_gpu", "upper_bound", reason, 0, at_most)


def unknown(scene: Callable[[Scene], MemorySample], reason: str) -> Row:
    return Row(scene, None, None, "unknown", reason, 0, None)


def partly(scene: Callable[[Scene], MemorySample], figure: int, reason: str, source: str) -> Row:
    return Row(scene, figure, source, "lower_bound", reason, figure, WHOLE)


IN_THE_DRIVERS_NAMESPACE = [
    exact(it_says_how_much, 2 * GIB),
    bounded(it_says_zero, "zero_bytes"),
    bounded(it_says_not_available, "not_available"),
    exact(it_lists_daemons_without_memory_too, 2 * GIB),
    bounded(it_lists_others_only, "no_match"),
    bounded(it_lists_nobody, "no_match"),
    exact(it_lists_a_process_twice_under_mps, 2 * GIB),
    exact(it_lists_a_process_under_mps_only, 2 * GIB),
    exact(it_lists_many_others, 2 * GIB),
    exact(the_process_is_on_another_gpu_too, 2 * GIB),
    exact(a_child_holds_memory, 3 * GIB),
    partly(a_childs_memory_is_not_told, 2 * GIB, "partly_unknown", "nvml"),
    partly(a_child_is_listed_and_the_worker_is_not, GIB, "partly_unknown", "nvml"),
    exact(a_child_lost_its_parent_after_it_was_seen, 3 * GIB),
    exact(a_worker_without_parent_is_the_worker, 2 * GIB),
    partly(a_child_vanished_and_is_still_listed, 2 * GIB, "partly_unknown", "nvml"),
    bounded(the_worker_vanished_and_is_still_listed, "process_gone"),
    bounded(the_gpu_is_cut_by_mig, "mig"),
    bounded(the_gpu_is_a_mig_instance, "mig"),
    unknown(the_gpu_is_lost, "gpu_lost"),
    unknown(the_gpu_is_lost_between_two_questions, "gpu_lost"),
    bounded(the_gpu_is_lost_and_cuda_knows_how_full_it_was, "gpu_lost", 30 * GIB),
    unknown(the_gpu_is_not_there, "gpu_not_found"),
    bounded(listing_is_not_permitted, "no_permission"),
    bounded(listing_is_not_supported, "not_supported"),
    bounded(listing_fails_otherwise, "nvml_error"),
    unknown(the_whole_gpu_is_said_to_hold_nothing, "no_match"),
    unknown(the_driver_is_not_loaded, "nvml_missing"),
    exact(others_closed_nvml, 2 * GIB),
    partly(the_allocator_knows_a_part, GIB, "no_match", "allocator"),
    bounded(the_allocator_cannot_be_asked, "no_match"),
    exact(the_cgroup_is_the_engines, 3 * GIB, "cgroup"),
    exact(the_cgroup_holds_the_servers_first_process, 3 * GIB, "cgroup"),
    exact(the_cgroup_is_shared, 2 * GIB),
    Row(
        the_cgroup_is_shared_and_nvml_silent,
        *(3 * GIB, "cgroup", "upper_bound", "cgroup_shared", 0, 3 * GIB),
    ),
    exact(the_cgroup_is_charged_nothing, 2 * GIB),
    bounded(the_cgroup_does_not_know_the_gpu, "not_available"),
    exact(the_worker_is_in_a_namespace_below, 2 * GIB),
]
IN_A_NAMESPACE_OF_ITS_OWN = [
    bounded(the_driver_lists_host_pids, "foreign_pids"),
    bounded(a_host_pid_is_ours_by_chance, "foreign_pids"),
    bounded(two_host_pids_are_pids_here_by_chance, "foreign_pids"),
    exact(the_driver_translates_pids, 2 * GIB),
    exact(the_driver_translates_pids_and_hides_others, 2 * GIB),
    bounded(the_driver_translates_pids_and_says_zero, "zero_bytes"),
    bounded(the_worker_is_outside, "other_namespace"),
    bounded(another_process_has_the_workers_pid, "pid_reused"),
    unknown(another_process_has_the_workers_pid_on_the_cpu, "pid_reused"),
    exact(another_process_has_a_childs_pid, 2 * GIB),
]
WITH_AN_OLD_DRIVER = [
    exact(it_says_how_much, 2 * GIB),
    bounded(it_says_zero, "zero_bytes", WHOLE + (512 << 20)),
]
WITHOUT_A_LIST_OF_PROCESSES = [
    bounded(it_says_how_much, "nvml_symbol_missing"),
    exact(nvidia_smi_lists_it, 2 * GIB, "nvidia_smi"),
]
WITHOUT_NVML = [
    unknown(there_is_no_nvml, "nvml_missing"),
    exact(nvidia_smi_lists_it, 2 * GIB, "nvidia_smi"),
    unknown(nvidia_smi_lists_it_without_figure, "nvml_missing"),
    unknown(nvidia_smi_lists_nobody, "nvml_missing"),
    Row(
        nvidia_smi_does_not_know_bus_ids,
        *(2560 << 20, "nvidia_smi", "upper_bound", "nvml_missing", 0, 2560 << 20),
    ),
    unknown(nvidia_smi_fails, "nvml_missing"),
    unknown(nvidia_smi_says_something_else, "nvml_missing"),
]
TABLES = {
    "driver's namespace": IN_THE_DRIVERS_NAMESPACE,
    "own namespace": IN_A_NAMESPACE_OF_ITS_OWN,
    "old driver": WITH_AN_OLD_DRIVER,
    "no list": WITHOUT_A_LIST_OF_PROCESSES,
    "no NVML": WITHOUT_NVML,
}
LACKING = {"old driver": ("newer",), "no list": ("processes",)}


def answer(sample: MemorySample) -> dict[str, Any]:
    return dict(msgspec.to_builtins(sample))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, MemorySample]]:
    """The samples of all rows of a table, each table played once and in one process."""

    @cache
    def play(table: str) -> dict[str, MemorySample]:
        folder = tmp_path_factory.mktemp("nvml")
        library = None if table == "no NVML" else build_nvml(folder, *LACKING.get(table, ()))
        names = [row.scene.__name__ for row in TABLES[table]]
        own = table == "own namespace"
        answers = run_scenes(answer, names, library=library, namespace=own)
        return {name: msgspec.convert(each, MemorySample) for name, each in answers.items()}

    return play


@cache
def may_unshare() -> bool:
    done = subprocess.run([*OWN_NAMESPACE, "true"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.parametrize(
    ("table", "row"),
    [
        pytest.param(table, row, id=f"{table}-{row.scene.__name__}")
        for table, rows in TABLES.items()
        for row in rows
    ],
)
def test_what_is_a_ranks_and_what_is_not_known(
    played: Callable[[str], dict[str, MemorySample]], table: str, row: Row
) -> None:
    below = row.scene is the_worker_is_in_a_namespace_below
    if (table == "own namespace" or below) and not may_unshare():
        pytest.skip("this user may not make pid namespaces")
    sample = played(table)[row.scene.__name__]
    assert row == Row(
        row.scene,
        sample.resident_bytes,
        sample.source,
        sample.quality,
        sample.reason,
        sample.at_least_bytes,
        sample.at_most_bytes,
    )


def test_no_row_reads_unknown_as_0(
    played: Callable[[str], dict[str, MemorySample]],
) -> None:
    """In no sample, and in no source of one: there are figures, and there is `None`."""
    for table in TABLES:
        if table == "own namespace" and not may_unshare():
            continue
        for name, sample in played(table).items():
            figures = [sample.resident_bytes, *(rung.resident_bytes for rung in sample.rungs)]
            assert 0 not in figures, name
            for rung in sample.rungs:
                assert (rung.resident_bytes is None) == (rung.quality == "unknown"), name
                assert rung.quality == "exact" or rung.reason, name
                assert rung.reason in ("", "allocator_only", "whole_gpu_only") or rung.detail, name
