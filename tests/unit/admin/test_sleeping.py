"""The sleep of an engine whose ranks can be made to fail; what works is in the contract suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import pytest

from engine_plugins.admin.schemas import SleepBody, WakeBody
from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from engine_plugins.admin.sleeping import Sleeping
from engine_plugins.admin.state import WeightsInstalled, moved
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
    assert (state.state, state.weights) == ("fenced", WeightsInstalled())


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
