"""Calls and answers between the admin side and a worker: plain bytes, and never an exception."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine_plugins import errors
from engine_plugins.errors import (
    AdminAnswerError,
    AdminRequestError,
    ConflictError,
    EngineCallError,
    EnginePluginError,
    OutdatedError,
    PeerLostError,
    UnknownIdError,
)
from engine_plugins.shared_page import SharedPage
from engine_plugins.weights.contract.manifest import encode_manifest
from engine_plugins.weights.contract.report import RankReport
from engine_plugins.weights.receiving.update_run import PullStatus
from engine_plugins.weights.receiving.worker_messages import (
    GENERATION,
    AbortAnswer,
    ConnectAnswer,
    Failure,
    StatusAnswer,
    WorkerDescription,
    encode_call,
    raised,
    read_answer,
)
from engine_plugins.weights.receiving.worker_service import BUSY_SINCE, WorkerService
from tests.support.in_memory_model import InMemoryModel, hf_tensors
from tests.support.in_memory_rank import InMemoryRank
from tests.support.source_ranks import offered_tensors


@pytest.fixture
def rank() -> Iterator[InMemoryRank]:
    made = InMemoryRank(InMemoryModel.loaded(hf_tensors(seed=0)), tp_rank=1)
    yield made
    made.close()


def ask(rank: InMemoryRank, call: str, kind: Any, **arguments: Any) -> Any:
    return read_answer(rank.service.call(call, encode_call(**arguments)), kind)


ERRORS = [
    kind
    for kind in (getattr(errors, name) for name in errors.__all__)
    if kind is not AdminAnswerError  # a client's, never a worker's
]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_of_ours_arrives_in_its_own_class(
    rank: InMemoryRank, kind: type[EnginePluginError]
) -> None:
    """Class, text and remedy: the caller acts on them as if it had been there."""
    rank.fail_next("connect", kind("seen: 3 of 5", remedy="do that"))
    with pytest.raises(EnginePluginError) as error:
        ask(rank, "connect", ConnectAnswer, plan_id="p", manifests=[])
    assert type(error.value) is kind
    assert (error.value.message, error.value.remedy) == ("seen: 3 of 5", "do that")


@pytest.mark.parametrize("method", ["begin", "install"])
def test_an_engines_own_exception_becomes_data(rank: InMemoryRank, method: str) -> None:
    """Raised across an RPC it would leave other ranks' answers behind."""
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        manifests = [encode_manifest(trainer.manifest)]
        ask(rank, "connect", ConnectAnswer, plan_id="p", manifests=manifests)
        ask(rank, "start", StatusAnswer, plan_id="p", staged=False, timeout_s=10)
        rank.installer.failures[method] = 0
        with pytest.raises(EngineCallError, match=rf"rank 1: advance: RuntimeError: .*{method}"):
            ask(rank, "advance", StatusAnswer, budget_s=5)
        assert ask(rank, "abort", AbortAnswer).wrote


@pytest.mark.parametrize(
    ("call", "arguments", "kind"),
    [
        ("no such call", encode_call(), AdminRequestError),
        ("__class__", encode_call(), AdminRequestError),
        ("poll", b"", EngineCallError),
        ("poll", b"\xc1 garbage", EngineCallError),
        ("poll", msgspec.msgpack.encode([1, 2]), EngineCallError),
        ("poll", encode_call(surprise=1), EngineCallError),
        ("connect", encode_call(plan_id="p", manifests=[b"garbage"]), EngineCallError),
        ("poll", encode_call(), ConflictError),
        ("finish", encode_call(), ConflictError),
        ("start", encode_call(plan_id="p", staged=False, timeout_s=1), UnknownIdError),
    ],
)
def test_whatever_is_asked_is_answered(
    rank: InMemoryRank, call: str, arguments: bytes, kind: type[EnginePluginError]
) -> None:
    """Unknown calls, garbage, calls out of order: an answer with an error in it."""
    answer = rank.service.call(call, arguments)
    with pytest.raises(EnginePluginError) as error:
        read_answer(answer, StatusAnswer)
    assert type(error.value) is kind


def test_a_failure_of_an_unknown_kind_is_still_an_error_of_ours() -> None:
    """A newer worker may know classes that this side does not."""
    body = msgspec.msgpack.encode(
        {"failure": {"kind": "NewerError", "message": "m", "remedy": "r"}}
    )
    with pytest.raises(EngineCallError, match="m"):
        read_answer(body, StatusAnswer)


@pytest.mark.parametrize("kind", ["annotations", "__all__", "AdminAnswerError", "__name__"])
def test_a_failure_can_only_become_an_error_class(kind: str) -> None:
    """The name is looked up among the errors, and nowhere else."""
    failure = msgspec.convert(
        {"kind": kind, "message": "m", "remedy": "r"},
        inspect.signature(raised, eval_str=True).parameters["failure"].annotation,
    )
    assert isinstance(raised(failure), EngineCallError)


def test_a_whole_update_goes_through_calls(rank: InMemoryRank) -> None:
    """Describe, connect, start, poll, advance, finish, drop: each answer in its own shape."""
    assert ask(rank, "describe", WorkerDescription) == WorkerDescription(
        tp_rank=1, pid=os.getpid(), host=os.uname().nodename
    )
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        manifests = [encode_manifest(trainer.manifest)]
        connected = ask(rank, "connect", ConnectAnswer, plan_id="p", manifests=manifests)
        assert connected.plan.tp_rank == 1
        assert connected.plan.bytes_needed == trainer.source.nbytes
        started = ask(rank, "start", StatusAnswer, plan_id="p", staged=True, timeout_s=10)
        assert (started.steps_total, started.failure) == (6, None)
        while (status := ask(rank, "poll", StatusAnswer)).bytes_done < status.bytes_total:
            pass
        assert status.bytes_done == status.bytes_total == trainer.source.nbytes
        assert ask(rank, "advance", StatusAnswer, budget_s=10).steps_installed == 6
        report = ask(rank, "finish", RankReport)
        assert (report.tp_rank, report.bytes_moved) == (1, trainer.source.nbytes)
        assert not ask(rank, "abort", AbortAnswer).wrote
        ask(rank, "drop", type(None), plan_id="p")
    assert rank.model.equals(InMemoryModel.loaded(hf_tensors(seed=1)))


def test_manifests_may_be_files_of_this_host(rank: InMemoryRank, tmp_path: Path) -> None:
    """A path stands for the bytes that are there; together they are many megabytes."""
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        body = encode_manifest(trainer.manifest)
        (tmp_path / "manifest").write_bytes(body)
        by_path, by_value = (
            ask(rank, "connect", ConnectAnswer, plan_id=name, manifests=[manifest])
            for name, manifest in (("p", str(tmp_path / "manifest")), ("q", body))
        )
    assert by_path.plan == by_value.plan


def test_a_failed_pull_travels_in_the_status(rank: InMemoryRank) -> None:
    """Polling never fails for it: where the update stands is told together with why it ended."""
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        manifests = [encode_manifest(trainer.manifest)]
        ask(rank, "connect", ConnectAnswer, plan_id="p", manifests=manifests)
        trainer.transport.close()
        ask(rank, "start", StatusAnswer, plan_id="p", staged=False, timeout_s=10)
        rank.wait()
        failure = ask(rank, "poll", StatusAnswer).failure
    assert failure.kind == "PeerLostError"
    error = raised(failure)
    assert isinstance(error, PeerLostError)
    assert error.message.startswith("rank 1: trainer-0")


def test_a_pull_tells_on_its_page_how_far_it_is(rank: InMemoryRank) -> None:
    """From its first bytes to its last ones, or to why it ended; each pull for itself."""
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        manifests = [encode_manifest(trainer.manifest)]
        ask(rank, "connect", ConnectAnswer, plan_id="p", manifests=manifests)
        trainer.transport.bytes_per_s = 2e4
        first = ask(rank, "start", StatusAnswer, plan_id="p", staged=True, timeout_s=10)
        told = list(_told(first, until=lambda status: status.may_begin))
        assert [each.bytes_done for each in told] == sorted(each.bytes_done for each in told)
        assert len(told) >= 3
        assert told[-1].bytes_done == trainer.source.nbytes
        ask(rank, "abort", AbortAnswer)
        trainer.transport.close()
        second = ask(rank, "start", StatusAnswer, plan_id="p", staged=True, timeout_s=10)
        last = list(_told(second, until=lambda status: status.failure is not None))[-1]
    assert last.note is not None
    assert last.note.number == first.note.number + 1
    assert isinstance(last.failure, Failure)
    assert last.failure.kind == "PeerLostError"


def test_an_error_of_any_length_fits_the_page(rank: InMemoryRank) -> None:
    """Cut there, if it must be: a pull must not fail of telling that it failed."""
    begun = StatusAnswer(
        tp_rank=1,
        steps_installed=0,
        steps_total=1,
        bytes_done=0,
        bytes_total=1,
        may_begin=False,
        failure=None,
        note=rank.service._note,
    )
    error = EnginePluginError("\N{SNOWMAN}" * 100_000, remedy="\N{SNOWMAN}" * 100_000)
    rank.service._tell(
        0,
        PullStatus(
            steps_ready=0,
            steps_installed=0,
            steps_total=1,
            bytes_done=0,
            bytes_total=1,
            may_begin=False,
            wrote=False,
            error=error,
        ),
    )
    (told,) = _told(begun, until=lambda status: status.failure is not None)
    assert told.failure is not None
    assert error.message.startswith(told.failure.message)
    assert len(told.failure.message) >= 1000


def test_kv_pages_are_cleared_once_the_load_has_ended(
    rank: InMemoryRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where it could not end: the old weights may serve on, with the KV that there is."""
    seen: list[object] = []
    service = WorkerService(rank.receiver, tp_rank=1, page=None, clear_kv=seen.append)
    with pytest.raises(ConflictError):
        read_answer(service.call("finish", encode_call()), RankReport)
    assert seen == []
    monkeypatch.setattr(rank.receiver, "finish", lambda: seen.append("ended"))
    for arguments in ({}, {"keep_kv": True}):
        read_answer(service.call("finish", encode_call(**arguments)), type(None))
    assert seen == ["ended", False, "ended", True]


def _told(
    begun: StatusAnswer, *, until: Callable[[StatusAnswer], bool], within_s: float = 10.0
) -> Iterator[StatusAnswer]:
    """What a page says of a pull, each once."""
    assert begun.note is not None
    page, deadline, seen = SharedPage(Path(begun.note.page)), time.monotonic() + within_s, 0
    while True:
        assert time.monotonic() < deadline
        if page.sequence == seen:
            time.sleep(0.001)
            continue
        seen, body = page.read()
        status = msgspec.msgpack.decode(body, type=StatusAnswer)
        if status.note is not None and status.note.number == begun.note.number:
            yield status
            if until(status):
                return


@pytest.mark.parametrize("body", [b"", b"\xff", msgspec.msgpack.encode({"value": [1]})])
def test_bytes_that_are_no_answer_are_an_error_of_ours(body: bytes) -> None:
    """Whoever asks handles one tree of errors, not msgspec's as well."""
    with pytest.raises(EngineCallError, match="a rank's answer cannot be read"):
        read_answer(body, WorkerDescription)


def test_an_error_that_names_a_path_that_is_no_text_travels(rank: InMemoryRank) -> None:
    """Python spells such a path with characters that no encoding takes."""
    for error in (OSError("no file b\udcff"), ConflictError("b\udcff")):
        rank.receiver.failures["start"] = error  # type: ignore[assignment]
        with pytest.raises(EnginePluginError, match=r"b\\udcff"):
            ask(rank, "start", StatusAnswer, plan_id="p", staged=True, timeout_s=1.0)


def test_calls_of_an_older_generation_are_refused(rank: InMemoryRank) -> None:
    """A stopped process that wakes up asks for what another one does by now."""

    def told(generation: int) -> WorkerDescription:
        call = encode_call(**{GENERATION: generation})
        return read_answer(rank.service.call("describe", call), WorkerDescription)

    assert told(3).tp_rank == 1
    assert told(3).tp_rank == 1
    with pytest.raises(OutdatedError, match=r"generation 3 by now.*of generation 2"):
        told(2)
    assert ask(rank, "describe", WorkerDescription).tp_rank == 1, "who says none asks for no update"
    assert told(4).tp_rank == 1


def test_a_rank_that_is_in_a_call_says_so_on_its_page(tmp_path: Path, rank: InMemoryRank) -> None:
    """Also where the call fails."""
    page, seen = tmp_path / "page", list[int]()
    calls = {"look at me": lambda: seen.append(SharedPage(page).gauges[BUSY_SINCE])}
    service = WorkerService(rank.receiver, tp_rank=1, page=page, calls=calls)
    before = time.monotonic()
    service.call("look at me", encode_call())
    assert before * 1e6 - 1 <= seen[0] <= time.monotonic() * 1e6
    assert SharedPage(page).gauges[BUSY_SINCE] == 0
    service.call("finish", encode_call())
    assert SharedPage(page).gauges[BUSY_SINCE] == 0
