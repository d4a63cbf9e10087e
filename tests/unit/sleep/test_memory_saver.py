"""Sleep through torch_memory_saver: its real binaries on a fake CUDA driver.

That driver's memory is shared memory of the process, so what is resident can be read.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_plugins.errors import EnginePluginError, NotConfiguredError
from engine_plugins.sleep.hook_mode import HookMode
from engine_plugins.sleep.memory_ledger import MemoryLedger
from engine_plugins.sleep.memory_saver import SaverMemory, load_memory_saver, pool_bytes
from tests.support.after_import import run_after_import
from tests.support.fake_cuda_driver import FakeGpu, start_environment

MIB = 1 << 20
WEIGHTS, CACHE = 6 * MIB, 8 * MIB
BUFFER = 2 * MIB
AWAKE = (WEIGHTS + BUFFER + CACHE) // MIB


@pytest.fixture(scope="module", params=["preload", "torch"])
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HookMode, dict[str, str]]:
    """A hook mode, and how its processes start."""
    mode: HookMode = request.param
    return mode, start_environment(tmp_path_factory.mktemp(mode), mode)


def run(started: tuple[HookMode, dict[str, str]], function: Any, *cases: list[Any]) -> list[Any]:
    """Answers and stderr of a function, given the mode, for each list of further arguments."""
    mode, at_start = started
    given: list[tuple[dict[str, str | None], list[Any]]]
    given = [({"FAKE_CUDA_BYTES": str(64 * MIB)}, [mode, *more]) for more in cases or [[]]]
    return run_after_import(function, given, at_start=at_start)


def resident_mib() -> int:
    """Shared memory of this process that is resident, which the fake device's is."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssShmem:")[2].split()[0]) // 1024


class Rank:
    """One engine rank with weights, a buffer among them, and a KV cache."""

    def __init__(self, mode: HookMode, *, cpu_backup: bool = False) -> None:
        self.gpu = FakeGpu(mode)
        self.weights = self.gpu.region("weights", WEIGHTS, cpu_backup=cpu_backup)
        self.cache = self.gpu.region("kv_cache", CACHE)
        self.buffer = self.gpu.region("weights", BUFFER).fill_(9)
        self.weights.view(-1, 256)[:] = torch.arange(256, dtype=torch.uint8)
        self.cache.fill_(7)
        self.values = self.weights.clone()
        self.ledger = MemoryLedger(
            SaverMemory(
                self.gpu.saver,
                {
                    "weights": lambda: [self.weights, self.weights[10:20]],
                    "kv_cache": lambda: [self.cache],
                    "cuda_graph": list,
                },
                sizes=lambda tag: {"weights": WEIGHTS + BUFFER, "kv_cache": CACHE}.get(tag, 0),
                mode=mode,
                lasting={"weights": lambda: [self.buffer]},
                backed_up=["weights"] if cpu_backup else [],
                free_bytes=self.gpu.free_bytes,
            )
        )

    def is_whole(self) -> bool:
        """Whether weights and buffer hold what they held at first."""
        return torch.equal(self.weights, self.values) and bool((self.buffer == 9).all())


def cycles(mode: HookMode, count: int) -> dict[str, Any]:
    rank = Rank(mode)
    seen: dict[str, Any] = {"awake": [resident_mib()], "asleep": [], "kept": []}
    for _ in range(count):
        rank.ledger.release(["kv_cache", "weights"], keep=True)
        seen["asleep"].append(resident_mib())
        rank.ledger.restore(["weights", "kv_cache"])
        seen["kept"].append(rank.is_whole())
        rank.cache.fill_(7)
        seen["awake"].append(resident_mib())
    seen["left"] = rank.ledger.unreleased()
    return seen


def test_pausing_gives_memory_back_and_resuming_returns_contents(
    started: tuple[HookMode, dict[str, str]],
) -> None:
    """Five times, at the same addresses, and nothing grows."""
    ((seen, said),) = run(started, cycles, [5])
    assert said == ""
    assert seen["asleep"] == [0] * 5
    assert seen["awake"] == [AWAKE] * 6
    assert all(seen["kept"])


def partly(mode: HookMode) -> list[int]:
    rank = Rank(mode)
    found = [resident_mib()]
    rank.ledger.release(["kv_cache"], keep=True)
    found.append(resident_mib())
    rank.ledger.release(["weights"], keep=True)
    found.append(resident_mib())
    rank.ledger.restore(["weights"])
    found.append(resident_mib())
    return found


def test_each_tag_goes_and_comes_back_by_itself(started: tuple[HookMode, dict[str, str]]) -> None:
    """Weights can be filled while the cache is still away."""
    ((found, _),) = run(started, partly)
    weights = AWAKE - CACHE // MIB
    assert found == [AWAKE, weights, 0, weights]


def without_contents(mode: HookMode) -> dict[str, Any]:
    rank = Rank(mode)
    rank.ledger.release(["weights"], keep=False)
    rank.ledger.restore(["weights"])
    return {
        "weights": torch.equal(rank.weights, rank.values),
        "buffer": bool((rank.buffer == 9).all()),
    }


def test_without_contents_only_what_lasts_comes_back(
    started: tuple[HookMode, dict[str, str]],
) -> None:
    """Buffers are in no checkpoint, so no update would bring them."""
    ((seen, _),) = run(started, without_contents)
    assert seen == {"weights": False, "buffer": True}


def backed_up(mode: HookMode) -> bool:
    rank = Rank(mode, cpu_backup=True)
    rank.ledger.release(["weights"], keep=True)
    rank.ledger.restore(["weights"])
    return rank.is_whole()


def test_what_the_library_keeps_is_not_copied_here(
    started: tuple[HookMode, dict[str, str]],
) -> None:
    """Regions with `enable_cpu_backup`."""
    ((kept, _),) = run(started, backed_up)
    assert kept is True


WRONG = ["pause twice", "resume twice", "resume what is mapped", "pause an unknown tag"]


def refused(mode: HookMode, what: str) -> dict[str, Any]:
    """Through the ledger: the code of the error, and whether a sleep goes well afterwards."""
    rank, code = Rank(mode), None
    ledger: Any = rank.ledger
    try:
        if what == "pause twice":
            ledger.release(["weights"], keep=True)
            ledger.release(["kv_cache", "weights"], keep=True)
        elif what == "resume twice":
            ledger.release(["weights"], keep=True)
            ledger.restore(["weights"])
            ledger.restore(["weights"])
        elif what == "resume what is mapped":
            ledger.restore(["kv_cache"])
        else:
            ledger.release(["weights", "optimizer"], keep=True)
    except EnginePluginError as error:
        code = error.code
    ledger.restore(ledger.released)
    ledger.release(["weights", "kv_cache"], keep=True)
    asleep = resident_mib()
    ledger.restore(["weights", "kv_cache"])
    return {"code": code, "asleep": asleep, "kept": rank.is_whole()}


def test_wrong_states_are_refused_before_they_end_the_process(
    started: tuple[HookMode, dict[str, str]],
) -> None:
    """And change nothing: the tags named beside the wrong one stay as they were."""
    answers = run(started, refused, *([what] for what in WRONG))
    codes = ["illegal_state"] * 3 + ["unsupported"]
    assert [answer for answer, _ in answers] == [
        {"code": code, "asleep": 0, "kept": True} for code in codes
    ]


def bare(mode: HookMode, what: str) -> int:
    """The same without the ledger."""
    rank = Rank(mode)
    saver = rank.gpu.saver
    if what == "pause twice":
        saver.pause("weights")
        saver.pause("weights")
    elif what == "resume twice":
        saver.pause("weights")
        saver.resume("weights")
        saver.resume("weights")
    elif what == "resume what is mapped":
        saver.resume("kv_cache")
    elif what == "touch what is paused":
        saver.pause("weights")
        rank.weights.sum()
    elif what == "resume without room":
        saver.pause("kv_cache")
        rank.gpu.take(rank.gpu.free_bytes())
        saver.resume("kv_cache")
    else:
        saver.pause("optimizer")
    return resident_mib()


def test_the_library_itself_ends_the_process(started: tuple[HookMode, dict[str, str]]) -> None:
    """What the ledger is for; should this fail one day, it may be needed no more."""
    fatal = [*WRONG[:3], "resume without room"]
    answers = run(started, bare, *([what] for what in fatal))
    assert [answer for answer, _ in answers] == [{"exit": 1}] * len(fatal)
    for (_, said), words in zip(
        answers, ["not active", "not paused", "not paused", "OUT_OF_MEMORY"], strict=True
    ):
        assert words in said
    (touched, _), (unknown, said) = run(
        started, bare, ["touch what is paused"], ["pause an unknown tag"]
    )
    assert touched == {"exit": -signal.SIGSEGV}
    assert unknown == AWAKE, "silently nothing"
    assert said == ""


def without_room(mode: HookMode) -> dict[str, Any]:
    rank, code = Rank(mode), None
    rank.ledger.release(["weights", "kv_cache"], keep=True)
    neighbour = rank.gpu.take(rank.gpu.free_bytes() - WEIGHTS)
    try:
        rank.ledger.restore(["weights", "kv_cache"])
    except EnginePluginError as error:
        code = error.code
    released = rank.ledger.released
    rank.gpu.give_back(neighbour)
    rank.ledger.restore(released)
    return {
        "code": code,
        "released": released,
        "kept": rank.is_whole(),
        "cache": int(rank.cache.sum()),
    }


def test_waking_without_room_is_refused_and_can_be_repeated(
    started: tuple[HookMode, dict[str, str]],
) -> None:
    """The library would exit."""
    ((seen, _),) = run(started, without_room)
    assert seen == {
        "code": "sleep_refused",
        "released": ["weights", "kv_cache"],
        "kept": True,
        "cache": 0,
    }


def tags_and_second_mode(mode: HookMode) -> list[Any]:
    rank = Rank(mode)
    try:
        load_memory_saver(mode)
    except NotConfiguredError as error:
        return [rank.ledger.tags, error.message]
    return []


def test_cuda_graphs_are_released_in_mode_preload_only(
    started: tuple[HookMode, dict[str, str]],
) -> None:
    """And once the library is in use its mode cannot be chosen any more."""
    (((tags, message), _),) = run(started, tags_and_second_mode)
    assert ("cuda_graph" in tags) is (started[0] == "preload")
    assert {"weights", "kv_cache"} < {*tags, "cuda_graph"}
    assert "in use already" in message


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With how to get it."""
    monkeypatch.setitem(sys.modules, "torch_memory_saver", None)
    with pytest.raises(NotConfiguredError, match="torch_memory_saver") as refused:
        load_memory_saver("torch")
    assert "pip install" in refused.value.remedy


def test_a_region_is_as_large_as_its_pool() -> None:
    """Blocks that lie there unused go with it; other pools do not count."""
    tensor = torch.empty(16)
    at = tensor.data_ptr()
    rows = [
        {"address": at - 64, "total_size": 256, "segment_pool_id": (0, 1)},
        {"address": at + 4096, "total_size": 1024, "segment_pool_id": (0, 1)},
        {"address": at + 8192, "total_size": 2048, "segment_pool_id": (0, 2)},
        {"address": at + 64, "total_size": 4096, "segment_pool_id": (0, 0)},
    ]
    assert pool_bytes([tensor, tensor[3:]], rows) == 256 + 1024
    assert pool_bytes([torch.empty(0)], rows) == 0
