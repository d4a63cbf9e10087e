"""torch_memory_saver in both hook modes, and the guard in front of it, on a real GPU.

Nothing here has run yet. Each case is a process of its own, since a process has one hook mode.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch

from engine_plugins.errors import ConflictError, HookModeError, SleepRefusedError
from engine_plugins.sleep.hook_mode import (
    HookMode,
    choose_hook_mode,
    device_capability,
    require_hook_mode_fits,
)
from engine_plugins.sleep.memory_ledger import MemoryLedger
from engine_plugins.sleep.memory_saver import SaverMemory, load_memory_saver, pool_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this process has no CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("torch_memory_saver") is None,
        reason="torch_memory_saver is not installed",
    ),
]

MIB = 1 << 20
WEIGHTS, CACHE, BUFFER = 512 * MIB, 1024 * MIB, 16 * MIB
DEVICE = torch.device("cuda:0")
Answer = TypeVar("Answer")


@pytest.fixture(params=["preload", "torch"])
def mode(request: pytest.FixtureRequest) -> HookMode:
    """A hook mode that this GPU survives."""
    chosen: HookMode = request.param
    try:
        require_hook_mode_fits(chosen)
    except HookModeError as error:
        pytest.skip(error.message)
    return chosen


def run(mode: HookMode, function: Callable[[HookMode], Answer]) -> Answer:
    """What a function of this module gives in a process of that hook mode."""
    spawned = multiprocessing.get_context("spawn")
    there, here = spawned.Pipe()
    process = spawned.Process(target=_answer, args=(here, function, mode))
    with _preloaded() if mode == "preload" else nullcontext():
        process.start()
    here.close()
    try:
        answer: Answer = there.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the process ended with {process.exitcode}")
    process.join()
    return answer


def _answer(pipe: Connection, function: Callable[[HookMode], Any], mode: HookMode) -> None:
    pipe.send(function(mode))


def _preloaded() -> AbstractContextManager[None]:
    library = importlib.import_module("torch_memory_saver")
    around: AbstractContextManager[None] = library.configure_subprocess()
    return around


class Rank:
    """Weights, a buffer and a KV cache in regions that the library made."""

    def __init__(self, mode: HookMode) -> None:
        library: Any = load_memory_saver(mode)
        self.saver = library
        with self.saver.region(tag="weights"):
            self.weights = torch.arange(WEIGHTS // 4, dtype=torch.int32, device=DEVICE)
            self.buffer = torch.full((BUFFER,), 9, dtype=torch.uint8, device=DEVICE)
        with self.saver.region(tag="kv_cache"):
            self.cache = torch.zeros(CACHE, dtype=torch.uint8, device=DEVICE)
        torch.cuda.synchronize()
        in_region = {"weights": [self.weights, self.buffer], "kv_cache": [self.cache]}
        self.ledger = MemoryLedger(
            SaverMemory(
                self.saver,
                {
                    "weights": lambda: [self.weights],
                    "kv_cache": lambda: [self.cache],
                    "cuda_graph": list,
                },
                sizes=lambda tag: pool_bytes(in_region.get(tag, [])),
                mode=mode,
                lasting={"weights": lambda: [self.buffer]},
            )
        )

    def is_whole(self) -> bool:
        """Whether weights and buffer hold what they held at first."""
        at = torch.arange(WEIGHTS // 4, dtype=torch.int32)
        return torch.equal(self.weights.cpu(), at) and bool((self.buffer == 9).all())


def free_bytes() -> int:
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info(DEVICE)
    return free


def cycles(mode: HookMode) -> list[tuple[int, bool, bool]]:
    """Bytes freed, whether all came back, and whether addresses stayed, of three cycles."""
    rank, found = Rank(mode), []
    at = (rank.weights.data_ptr(), rank.cache.data_ptr())
    for _ in range(3):
        before = free_bytes()
        rank.ledger.release(["weights", "kv_cache"], keep=True)
        freed = free_bytes() - before
        rank.ledger.restore(["weights", "kv_cache"])
        rank.cache.fill_(1)
        same = at == (rank.weights.data_ptr(), rank.cache.data_ptr())
        found.append((freed, rank.is_whole(), same))
    return found


def test_memory_goes_back_to_the_gpu_and_contents_return(mode: HookMode) -> None:
    """All of it, each time; the caching allocator keeps nothing of a region."""
    for freed, whole, same in run(mode, cycles):
        assert freed >= WEIGHTS + CACHE + BUFFER
        assert whole
        assert same


def level_2(mode: HookMode) -> bool:
    rank = Rank(mode)
    rank.ledger.release(["weights"], keep=False)
    rank.ledger.restore(["weights"])
    return bool((rank.buffer == 9).all())


def test_buffers_return_without_weights(mode: HookMode) -> None:
    assert run(mode, level_2) is True


def sizes(mode: HookMode) -> tuple[int, int]:
    rank = Rank(mode)
    expected, before = pool_bytes([rank.cache]), free_bytes()
    rank.ledger.release(["kv_cache"], keep=False)
    return expected, free_bytes() - before


def test_a_pool_is_as_large_as_what_its_release_frees(mode: HookMode) -> None:
    """By the allocator's own list of segments; the driver rounds to 2 MiB."""
    expected, freed = run(mode, sizes)
    assert expected >= CACHE
    assert freed == pytest.approx(expected, abs=4 * MIB)


def refusals(mode: HookMode) -> list[str]:
    """Wrong states, and a wake for which another has taken the memory; the process lives on."""
    rank, found = Rank(mode), []
    rank.ledger.release(["weights", "kv_cache"], keep=True)
    try:
        rank.ledger.release(["weights"], keep=True)
    except ConflictError as error:
        found.append(error.code)
    neighbour = torch.empty(free_bytes() - 256 * MIB, dtype=torch.uint8, device=DEVICE)
    try:
        rank.ledger.restore(["weights"])
    except SleepRefusedError as error:
        found.append(error.code)
    del neighbour
    torch.cuda.empty_cache()
    rank.ledger.restore(["weights", "kv_cache"])
    try:
        rank.ledger.restore(["weights"])
    except ConflictError as error:
        found.append(error.code)
    return [*found, "whole" if rank.is_whole() else "lost"]


def test_what_would_end_the_process_is_refused(mode: HookMode) -> None:
    assert run(mode, refusals) == ["illegal_state", "sleep_refused", "illegal_state", "whole"]


def graphs(mode: HookMode) -> tuple[bool, int, bool]:
    """Whether graphs can be released, what that frees, and whether a replay is right afterwards."""
    rank = Rank(mode)
    if "cuda_graph" not in rank.ledger.tags:
        return False, 0, False
    start = torch.ones(64 * MIB, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with rank.saver.cuda_graph(graph, tag="cuda_graph"):
        result = (start * 2) + 1
    before = free_bytes()
    rank.ledger.release(["cuda_graph"], keep=False)
    freed = free_bytes() - before
    rank.ledger.restore(["cuda_graph"])
    graph.replay()
    torch.cuda.synchronize()
    return True, freed, bool((result == 3).all())


def test_cuda_graphs_are_released_in_mode_preload_only(mode: HookMode) -> None:
    can, freed, right = run(mode, graphs)
    assert can is (mode == "preload")
    if can:
        assert freed >= 256 * MIB
        assert right


def test_the_guard_goes_by_the_real_capability() -> None:
    """Of the newest GPU that this process sees."""
    capability = device_capability()
    assert capability == max(
        torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())
    )
    assert capability is not None
    if capability[0] >= 10:
        assert choose_hook_mode(environ={}) == "torch"
        with pytest.raises(HookModeError, match="preload"):
            require_hook_mode_fits("preload", environ={})
    else:
        assert choose_hook_mode(environ={}) == "preload"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_refused_in_a_process_that_has_them(name: str) -> None:
    """Asked in the process itself, whose allocator follows the variable."""
    with mock.patch.dict(os.environ, {name: "expandable_segments:True"}):
        assert run("torch", chosen) == "HookModeError"


def chosen(mode: HookMode) -> str:
    torch.zeros(1, device=DEVICE)
    try:
        return choose_hook_mode(mode)
    except HookModeError as error:
        return type(error).__name__
