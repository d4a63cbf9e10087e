"""The sleep of an engine whose ranks can be made to fail; what works is in the contract suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import pytest

from engine_plugins.admin.schemas import SleepBody, WakeBody
from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from engine_plugins.admin.sleeping import Sleeping
from engine_plugins.admin.state import WeightsInstalled, moved, not_now
from engine_plugins.errors import (
    ConflictError,
    EngineCallError,
    EnginePluginError,
    SleepRefusedError,
    UnsupportedError,
)
from engine_plugins.settings import Settings
from engine_plugins.sleep.memory_backend import MEMORY_TAGS, MemoryTag
from tests.support.admin_server import TOKEN, AdminServer
from tests.support.in_memory_engine import InMemoryEngine

pytestmark = pytest.mark.anyio

ALL = sorted(MEMORY_TAGS)


class Bed:
    """An engine of two ranks, with its sleep."""

    def __init__(self, folder: Path) -> None:
        create_runtime_dir(folder)
        self.shared = SharedState(folder)
        self.engine = InMemoryEngine(tp_size=2)
        self.regions = [rank.regions for rank in self.engine.ranks]
        self.sleeping = Sleeping(self.engine, self.shared, Settings(residual_policy="observe"))

    @property
    def released(self) -> list[list[MemoryTag]]:
        """What each rank has released."""
        return [sorted(regions.released) for regions in self.regions]


@pytest.fixture
def bed(tmp_path: Path) -> Iterable[Bed]:
    """An engine that serves."""
    made = Bed(tmp_path / "run")
    yield made
    made.engine.close()


async def test_a_refusal_on_one_rank_undoes_the_others(bed: Bed) -> None:
    """Nothing was lost: the engine serves as before, and the next sleep works."""
    bed.regions[1].failures["release", "weights"] = SleepRefusedError("no room", remedy="make some")
    with pytest.raises(SleepRefusedError, match=r"no room.*the other 1 ranks are well"):
        await bed.sleeping.sleep(SleepBody())
    assert bed.released == [[], []]
    state = bed.shared.read()
    assert (state.state, state.sleep, bed.engine.calls[-1]) == ("serving", None, "resume")
    await bed.sleeping.sleep(SleepBody())
    assert bed.released == [ALL, ALL]


@pytest.mark.parametrize("level", [1, 2])
async def test_a_rank_that_breaks_half_way_fences_for_good(bed: Bed, level: Literal[1, 2]) -> None:
    """Nobody knows what its memory holds; every later call says so."""
    bed.regions[0].failures["release", "kv_cache"] = RuntimeError("driver said no")
    with pytest.raises(EngineCallError, match="driver said no") as error:
        await bed.sleeping.sleep(SleepBody(level=level))
    assert "restart the engine" in error.value.remedy
    state = bed.shared.read()
    assert state.state == "fenced"
    assert state.fence is not None
    assert (state.fence.code, state.fence.for_good) == ("sleep_failed", True)
    for call in (bed.sleeping.sleep(SleepBody()), bed.sleeping.wake(WakeBody())):
        with pytest.raises(ConflictError, match="sleep_failed"):
            await call


async def test_weights_that_one_rank_has_lost_cannot_be_undone(bed: Bed) -> None:
    """Level 2: the other rank's refusal comes too late for the first one's weights."""
    bed.regions[1].failures["release", "weights"] = SleepRefusedError("busy")
    with pytest.raises(SleepRefusedError):
        await bed.sleeping.sleep(SleepBody(level=2))
    state = bed.shared.read()
    assert (state.state, state.sleep, state.weights) == ("fenced", None, WeightsInstalled())
    assert state.fence is not None
    assert not state.fence.for_good, "all memory is mapped, and new weights can fill it"
    assert "weights were discarded" in state.fence.detail
    assert "/weights/update" in state.fence.remedy
    assert bed.released == [[], []]


@pytest.mark.parametrize("breaks", ["release", "restore"])
async def test_a_fence_ends_requests_and_takes_the_version_back(bed: Bed, breaks: str) -> None:
    """Held and queued ones, in both directions: nobody waits for an engine that is lost."""
    bed.shared.change(lambda now: moved(now, "serving", weights=WeightsInstalled(version=7)))
    held = bed.engine.submit(1, 2, 3)
    bed.regions[1].failures[breaks, "weights"] = RuntimeError("driver said no")
    if breaks == "restore":
        await bed.sleeping.sleep(SleepBody())
    call = bed.sleeping.sleep(SleepBody()) if breaks == "release" else bed.sleeping.wake(WakeBody())
    with pytest.raises(EngineCallError, match="driver said no"):
        await call
    state = bed.shared.read()
    assert (state.state, state.weights) == ("fenced", WeightsInstalled())
    assert (held.finish_reason, bed.engine.calls[-1]) == ("error", "fail_requests")


async def test_a_fence_that_cannot_end_requests_stays_a_fence(bed: Bed) -> None:
    """The error of the sleep is what its caller is told."""
    bed.regions[0].failures["release", "kv_cache"] = RuntimeError("driver said no")
    bed.engine.fail_once.add("fail_requests")
    with pytest.raises(EngineCallError, match="driver said no"):
        await bed.sleeping.sleep(SleepBody())
    assert bed.shared.read().state == "fenced"


async def test_a_wake_that_breaks_fences_for_good(bed: Bed) -> None:
    """Half-mapped memory never serves."""
    await bed.sleeping.sleep(SleepBody())
    bed.regions[0].failures["restore", "weights"] = RuntimeError("out of memory")
    with pytest.raises(EngineCallError, match="out of memory"):
        await bed.sleeping.wake(WakeBody())
    state = bed.shared.read()
    assert state.fence is not None
    assert (state.fence.code, state.fence.for_good) == ("wake_failed", True)


async def test_a_wake_that_one_rank_refuses_can_be_repeated(bed: Bed) -> None:
    """Nothing broke: the engine sleeps on, and there has to be room for the other rank alone."""
    await bed.sleeping.sleep(SleepBody())
    asleep = bed.shared.read()
    bed.regions[1].failures["restore", "weights"] = SleepRefusedError("no room", remedy="make some")
    with pytest.raises(SleepRefusedError, match="no room") as error:
        await bed.sleeping.wake(WakeBody())
    assert error.value.remedy == "make some"
    assert bed.released == [[], ALL]
    assert bed.shared.read() == asleep
    for rank in bed.engine.ranks:
        rank.free_bytes = 3 << 30
    await bed.sleeping.wake(WakeBody())
    assert bed.released == [[], []]
    assert bed.shared.read().state == "serving"


async def test_a_wake_after_which_a_rank_says_nothing_fences_for_good(bed: Bed) -> None:
    """Nobody knows what is mapped."""
    await bed.sleeping.sleep(SleepBody())
    bed.regions[1].failures["restore", "weights"] = SleepRefusedError("no room")
    bed.engine.fail_once.add("ledger")
    with pytest.raises(SleepRefusedError, match="no room") as error:
        await bed.sleeping.wake(WakeBody())
    assert "restart the engine" in error.value.remedy
    state = bed.shared.read()
    assert state.fence is not None
    assert (state.state, state.fence.code) == ("fenced", "wake_failed")


async def test_a_wake_without_room_changes_nothing(bed: Bed) -> None:
    """Ranks of one device share what is free; one tag may fit where all do not."""
    await bed.sleeping.sleep(SleepBody())
    for rank in bed.engine.ranks:
        rank.free_bytes = 5 << 30
    with pytest.raises(ConflictError, match=r"6 GiB are to be mapped .* 5 GiB are free"):
        await bed.sleeping.wake(WakeBody())
    assert bed.released == [ALL, ALL]
    assert bed.shared.read().state == "asleep"
    await bed.sleeping.wake(WakeBody(tags=["weights"]))
    await bed.sleeping.wake(WakeBody())
    assert bed.shared.read().state == "serving"


async def test_a_sleep_whose_api_process_died_is_ended_by_a_wake(bed: Bed) -> None:
    """One rank had released, the other had not: both are mapped, and the engine serves."""
    await bed.sleeping.sleep(SleepBody())
    for tag in MEMORY_TAGS:
        bed.engine.ranks[1].sleep_ledger.restore([tag])
    await bed.sleeping.wake(WakeBody())
    assert bed.released == [[], []]
    assert bed.shared.read().state == "serving"


async def test_a_wake_whose_resume_failed_is_completed_by_another(bed: Bed) -> None:
    """All is mapped by then; other calls say what is missing, and nothing that is not so."""
    await bed.sleeping.sleep(SleepBody())
    bed.engine.fail_once.add("resume")
    with pytest.raises(EngineCallError, match="resume"):
        await bed.sleeping.wake(WakeBody())
    state = bed.shared.read()
    assert state.sleep is not None
    assert (state.state, state.sleep.released, state.sleep.weights_lost) == ("asleep", [], False)
    refused = not_now(state, doing="resume")
    assert "discarded" not in refused.message
    assert (refused.remedy, "was not resumed" in refused.message) == ("POST /admin/v1/wake", True)
    await bed.sleeping.wake(WakeBody())
    assert (bed.shared.read().state, bed.engine.paused) == ("serving", False)


async def test_an_undone_sleep_whose_resume_failed_is_completed_by_a_wake(bed: Bed) -> None:
    """Nothing is released and nothing lost, whatever the level."""
    bed.shared.change(lambda now: moved(now, "serving", weights=WeightsInstalled(version=7)))
    bed.regions[0].failures["release", "weights"] = SleepRefusedError("no room")
    bed.regions[1].failures["release", "weights"] = SleepRefusedError("no room")
    bed.engine.fail_once.add("resume")
    with pytest.raises(SleepRefusedError, match="no room") as error:
        await bed.sleeping.sleep(SleepBody(level=2))
    assert "/wake" in error.value.remedy
    state = bed.shared.read()
    assert state.sleep is not None
    assert (state.state, state.sleep.released, state.sleep.weights_lost) == ("asleep", [], False)
    await bed.sleeping.wake(WakeBody())
    state = bed.shared.read()
    assert (state.state, state.weights.version) == ("serving", 7)


async def test_a_sleep_that_is_repeated_measures_again(bed: Bed) -> None:
    """Nothing is released twice, and a lost answer can be had by the same call."""
    first = await bed.sleeping.sleep(SleepBody())
    state, cycles = bed.shared.read(), bed.sleeping.leaks()[0].cycles
    for body in (SleepBody(), SleepBody(tags=["weights"]), SleepBody(tags=[*MEMORY_TAGS])):
        again = await bed.sleeping.sleep(body)
        assert [row.tp_rank for row in again.rows] == [row.tp_rank for row in first.rows]
        assert again.verdict == first.verdict
    assert (bed.shared.read(), bed.sleeping.leaks()[0].cycles) == (state, cycles)
    assert bed.engine.calls.count("release") == 1


async def test_a_sleep_whose_api_process_died_is_completed_by_another(bed: Bed) -> None:
    """One rank had released, the other had not; nothing is released twice."""
    await bed.sleeping.sleep(SleepBody())
    for tag in MEMORY_TAGS:
        bed.engine.ranks[1].sleep_ledger.restore([tag])
    await bed.sleeping.sleep(SleepBody())
    assert bed.released == [ALL, ALL]


async def test_a_sleep_of_more_releases_the_rest(bed: Bed) -> None:
    """Without tags the target is all that the engine can release."""
    await bed.sleeping.sleep(SleepBody(tags=["kv_cache"]))
    await bed.sleeping.sleep(SleepBody(tags=["kv_cache", "weights"]))
    assert bed.released == [["kv_cache", "weights"]] * 2
    await bed.sleeping.sleep(SleepBody())
    assert bed.released == [ALL, ALL]
    await bed.sleeping.wake(WakeBody())
    assert bed.shared.read().state == "serving"


async def test_a_sleep_of_another_level_is_another_target(bed: Bed) -> None:
    """Kept weights are not discarded while they are released, nor lost ones kept."""
    await bed.sleeping.sleep(SleepBody(level=1))
    with pytest.raises(ConflictError, match="released already, and kept"):
        await bed.sleeping.sleep(SleepBody(level=2))
    await bed.sleeping.sleep(SleepBody(level=2, tags=["kv_cache"]))
    await bed.sleeping.wake(WakeBody())
    await bed.sleeping.sleep(SleepBody(level=2))
    await bed.sleeping.sleep(SleepBody(level=2))
    with pytest.raises(ConflictError, match="discarded already"):
        await bed.sleeping.sleep(SleepBody(level=1))


async def test_a_wake_that_is_repeated_has_nothing_to_do(bed: Bed) -> None:
    """By tags, in full, of an engine that is awake, and of one whose weights are lost."""
    await bed.sleeping.sleep(SleepBody(level=2))
    for tags in (["weights"], ["weights"], ["kv_cache", "weights"], ["kv_cache"]):
        await bed.sleeping.wake(WakeBody(tags=tags))  # type: ignore[arg-type]
    for _ in range(2):
        await bed.sleeping.wake(WakeBody())
        state = bed.shared.read()
        assert state.sleep is not None
        assert (state.state, state.sleep.released) == ("asleep", [])
    assert bed.engine.calls.count("restore") == 3
    bed.shared.change(lambda now: moved(now, "serving", sleep=None))
    before = [*bed.engine.calls]
    await bed.sleeping.wake(WakeBody())
    assert (bed.shared.read().state, bed.engine.calls) == ("serving", before)


@pytest.mark.parametrize("state", ["updating", "fenced"])
async def test_wake_is_refused_in_other_states(bed: Bed, state: str) -> None:
    """A fence is no sleep that has ended."""
    bed.shared.change(lambda now: moved(now, state))  # type: ignore[arg-type]
    with pytest.raises(ConflictError, match=f"cannot wake while {state}"):
        await bed.sleeping.wake(WakeBody())


async def test_memory_is_told_to_the_log_once(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    """A dashboard polls; each sleep is told."""
    for _ in range(3):
        await bed.sleeping.memory()
    assert caplog.text.count("residual memory: unknown") == 1
    await bed.sleeping.sleep(SleepBody())
    assert caplog.text.count("residual memory: unknown") == 2


async def test_a_tag_that_no_rank_can_release_changes_nothing(bed: Bed) -> None:
    """It is found before the engine is paused."""
    for regions in bed.regions:
        regions.tags = frozenset({"kv_cache"})
    with pytest.raises(UnsupportedError, match="it can: kv_cache"):
        await bed.sleeping.sleep(SleepBody(tags=["weights"]))
    assert bed.engine.calls == ["may_release"]
    assert bed.shared.read().state == "serving"


async def test_tags_that_go_together_are_not_released_alone(bed: Bed) -> None:
    """VLLM's sleep mode releases everything at once."""
    for regions in bed.regions:
        regions.together = True
    with pytest.raises(UnsupportedError, match="only together"):
        await bed.sleeping.sleep(SleepBody(tags=["weights"]))
    await bed.sleeping.sleep(SleepBody())
    await bed.sleeping.wake(WakeBody(tags=["weights"]))
    assert bed.released == [["cuda_graph", "kv_cache"]] * 2
    assert bed.shared.read().state == "asleep"
    with pytest.raises(ConflictError, match="released already") as error:
        await bed.sleeping.sleep(SleepBody())
    assert "/wake" in error.value.remedy


async def test_weights_are_kept_at_level_1_only(bed: Bed) -> None:
    """Cache and graphs never come back with what they held."""
    await bed.sleeping.sleep(SleepBody(level=1))
    kept = [regions.released for regions in bed.regions]
    assert kept == [{"weights": True, "kv_cache": False, "cuda_graph": False}] * 2


async def test_a_sleep_that_is_not_known_to_have_freed_anything_is_507(
    make_server: Callable[..., AdminServer],
) -> None:
    """Under policy enforce; the answer says who holds what, and the engine sleeps."""
    server = make_server(settings=Settings(admin_token=TOKEN, residual_policy="enforce"))
    async with server.running():
        refused = await server.post("/sleep")
        assert (refused.status_code, refused.json()["code"]) == (507, "residual_memory")
        assert refused.json()["memory"]["reason"] == "no_baseline"
        assert [row["tp_rank"] for row in refused.json()["memory"]["rows"]] == [0]
        state = await server.state()
        assert (state["state"], state["sleep"]["verdict"]) == ("asleep", "unknown")
        assert (await server.post("/wake")).json()["state"] == "serving"


async def test_every_sleep_is_a_cycle_of_the_leak_watch(bed: Bed) -> None:
    """Kept where each API process finds it."""
    for _ in range(3):
        await bed.sleeping.sleep(SleepBody())
        await bed.sleeping.wake(WakeBody())
    other = Sleeping(bed.engine, SharedState(bed.shared.runtime_dir), Settings())
    assert [(each.device, each.cycles) for each in other.leaks()] == [("cpu:0", 3), ("cpu:1", 3)]


@pytest.mark.parametrize("state", ["updating", "fenced"])
async def test_sleep_is_refused_in_other_states(bed: Bed, state: str) -> None:
    """And asks nothing of the engine."""
    bed.shared.change(lambda now: moved(now, state))  # type: ignore[arg-type]
    with pytest.raises(EnginePluginError, match=f"cannot sleep while {state}"):
        await bed.sleeping.sleep(SleepBody())
    assert bed.engine.calls == []
