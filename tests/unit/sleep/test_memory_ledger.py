"""The ledger lets no call through that a memory saver would not survive."""

from __future__ import annotations

import contextlib
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugins.errors import ConflictError, SleepRefusedError, UnsupportedError
from engine_plugins.sleep.memory_backend import MEMORY_TAGS, MemoryTag
from engine_plugins.sleep.memory_ledger import MemoryLedger
from tests.support.in_memory_regions import InMemoryRegions


class Saver(InMemoryRegions):
    """Ends on a wrong state, as torch_memory_saver does, and notes what was asked of it."""

    tags: frozenset[MemoryTag] = frozenset({"weights", "kv_cache"})

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def release(self, tag: MemoryTag, *, keep: bool) -> None:
        self.calls.append(("release", tag, keep))
        if tag in self.released or tag not in self.tags:
            raise SystemExit(1)
        super().release(tag, keep=keep)

    def restore(self, tag: MemoryTag) -> None:
        self.calls.append(("restore", tag))
        if tag not in self.released:
            raise SystemExit(1)
        super().restore(tag)

    def unreleased(self, tag: MemoryTag) -> dict[str, int]:
        return {"edges": 10, f"of {tag}": 1}


class Together(Saver):
    together = True


@pytest.fixture
def saver() -> Saver:
    return Saver()


@pytest.fixture
def ledger(saver: Saver) -> MemoryLedger:
    return MemoryLedger(saver)


def test_weights_go_last_and_come_back_first(ledger: MemoryLedger, saver: Saver) -> None:
    """Whatever the order asked for, and each once; contents return of weights alone."""
    ledger.release(["weights", "kv_cache", "weights"], keep=True)
    assert list(ledger.released) == ["weights", "kv_cache"]
    ledger.restore(["kv_cache", "weights", "kv_cache"])
    assert not ledger.released
    assert saver.calls == [
        ("release", "kv_cache", False),
        ("release", "weights", True),
        ("restore", "weights"),
        ("restore", "kv_cache"),
    ]


def test_weights_are_not_kept_unless_asked(ledger: MemoryLedger, saver: Saver) -> None:
    """Nothing may serve with them."""
    ledger.release(["weights"], keep=False)
    assert saver.calls == [("release", "weights", False)]


def test_a_wrong_tag_is_found_before_any_is_touched(ledger: MemoryLedger, saver: Saver) -> None:
    """Released twice, restored while mapped, or not this engine's."""
    with pytest.raises(ConflictError, match="kv_cache is not released"):
        ledger.restore(["kv_cache"])
    with pytest.raises(UnsupportedError, match=r"cuda_graph.*it can: weights, kv_cache"):
        ledger.release(["weights", "cuda_graph"], keep=True)
    ledger.release(["kv_cache"], keep=True)
    with pytest.raises(ConflictError, match="kv_cache is released already") as twice:
        ledger.release(["weights", "kv_cache"], keep=True)
    assert twice.value.remedy
    with pytest.raises(ConflictError, match="weights is not released"):
        ledger.restore(["kv_cache", "weights"])
    assert saver.calls == [("release", "kv_cache", False)]


def test_what_is_asked_beforehand_changes_nothing(ledger: MemoryLedger, saver: Saver) -> None:
    """A sleep asks all ranks first, then releases."""
    ledger.require_mapped(["weights", "kv_cache"])
    with pytest.raises(ConflictError):
        ledger.require_released(["weights"])
    ledger.release(["weights"], keep=True)
    ledger.require_released(["weights"])
    with pytest.raises(ConflictError):
        ledger.require_mapped(["weights"])
    assert len(saver.calls) == 1


def test_a_refusal_of_the_backend_leaves_the_tag_as_it_was(
    ledger: MemoryLedger, saver: Saver
) -> None:
    """Nothing has happened then, so the call can be made again."""
    saver.failures["release", "weights"] = SleepRefusedError("no room for the contents")
    with pytest.raises(SleepRefusedError):
        ledger.release(["weights"], keep=True)
    ledger.release(["weights"], keep=True)
    saver.failures["restore", "weights"] = SleepRefusedError("the GPU is full")
    with pytest.raises(SleepRefusedError):
        ledger.restore(["weights"])
    assert ledger.released == ("weights",)
    ledger.restore(["weights"])
    assert not ledger.released


@pytest.mark.parametrize("call", ["release", "restore"])
def test_a_tag_that_failed_half_way_is_never_called_again(
    ledger: MemoryLedger, saver: Saver, call: str
) -> None:
    """The error is passed on; what was done before it stays known."""
    if call == "restore":
        ledger.release(["weights", "kv_cache"], keep=True)
    saver.failures[call, "weights"] = OSError("half way")
    more = {"keep": True} if call == "release" else {}
    with pytest.raises(OSError, match="half way"):
        getattr(ledger, call)(["weights", "kv_cache"], **more)
    assert ledger.broken == ("weights",)
    assert "kv_cache" in ledger.released
    calls = len(saver.calls)
    for again in (ledger.require_mapped, ledger.require_released, ledger.restore):
        with pytest.raises(ConflictError, match="weights is not known: OSError: half way") as said:
            again(["weights"])
        assert said.value.remedy == "restart the engine"
    assert len(saver.calls) == calls
    ledger.restore(["kv_cache"])


def test_what_goes_only_together_is_refused_in_part(saver: Saver) -> None:
    """And is mapped again one by one."""
    ledger = MemoryLedger(Together())
    with pytest.raises(UnsupportedError, match="weights and kv_cache only together"):
        ledger.release(["weights"], keep=True)
    ledger.release(["kv_cache", "weights"], keep=True)
    ledger.restore(["weights"])
    assert ledger.released == ("kv_cache",)


def test_what_stays_is_summed_by_reason_over_released_tags(ledger: MemoryLedger) -> None:
    assert ledger.unreleased() == {}
    ledger.release(["weights", "kv_cache"], keep=True)
    assert ledger.unreleased() == {"edges": 20, "of weights": 1, "of kv_cache": 1}
    ledger.restore(["weights"])
    assert ledger.unreleased() == {"edges": 10, "of kv_cache": 1}


def test_every_tag_has_a_place_in_the_order() -> None:
    assert get_args(MemoryTag) == MEMORY_TAGS


TAGS = st.lists(st.sampled_from([*MEMORY_TAGS, "optimizer"]), max_size=3)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["release", "restore"]),
        TAGS,
        st.booleans(),
        st.sampled_from([None, None, None, OSError("x"), SleepRefusedError("x")]),
    ),
    max_size=12,
)


@given(CALLS)
def test_no_sequence_of_calls_ends_the_process(calls: list[tuple[str, Any, bool, Any]]) -> None:
    """Nor does the ledger ever differ from the backend on a tag that it vouches for."""
    saver = Saver()
    ledger = MemoryLedger(saver)
    for call, tags, keep, failure in calls:
        saver.failures = {} if failure is None else {(call, "weights"): failure}
        with contextlib.suppress(ConflictError, UnsupportedError, SleepRefusedError, OSError):
            if call == "release":
                ledger.release(tags, keep=keep)
            else:
                ledger.restore(tags)
        known = saver.tags - set(ledger.broken)
        assert {tag for tag in ledger.released if tag in known} == saver.released.keys() & known
