"""The engines as one trainer process sees them: what each was told, and what it answered."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import httpx
import msgspec

from engine_plugins.admin_answers import Direction, UpdateRequest
from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import (
    AdminAnswerError,
    EnginePluginError,
    EngineUnreachableError,
    UnknownIdError,
    UpdateEndUnknownError,
    UpdateFailedError,
)
from engine_plugins.sender.busy_engine import once_it_is_free
from engine_plugins.sender.held_weights import ASKED_S, held_by
from engine_plugins.sender.known_end import answer_or_end
from engine_plugins.sender.report import EngineFailure
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport

__all__ = ["SILENT_S", "EngineLink", "failure_of", "for_each_engine", "forgot_us"]

Result = TypeVar("Result")

LEAST_S = 1.0
"""A commit is waited for as long as this, however little of its update's time is left."""
SILENT_S = 0.3
"""For one more question to an engine that has just been silent."""


class EngineLink:
    """One engine: its client, the source_ids that it gave us, and the plan that it made.

    The trainer's ranks are named by their places in the group.
    """

    def __init__(self, client: AdminClient) -> None:
        self.client = client
        self.plan: PlanSummary | None = None
        self._source_ids: dict[int, str | None] = {}
        """By rank; None for one that has nothing to offer."""
        self._planned: tuple[str, ...] = ()
        self._peers: dict[bytes, str] = {}
        self._planned_again = False
        self._waited_s = 0.0
        self._until = 0.0
        """When the engine gives up what it prepared, on the monotonic clock."""

    @property
    def url(self) -> str:
        """The engine's base url, which names it everywhere."""
        return self.client.url

    @property
    def host(self) -> str:
        """Name or address of the engine's host, as its url has it."""
        return httpx.URL(self.url).host

    def lacks(self, place: int) -> bool:
        """Whether a rank has yet to offer to this engine."""
        return place not in self._source_ids

    def publish(self, packed: Mapping[int, bytes | bytearray | memoryview]) -> None:
        """Offer manifests of ranks, those that the engine has not got.

        Args:
            packed: each as `pack_manifest` gives it; an empty one is of a rank with no tensors.

        Raises:
            EnginePluginError: the engine refused, or cannot be reached.
        """
        new = {place: each for place, each in packed.items() if self.lacks(place)}
        full = {place: each for place, each in new.items() if len(each)}
        ids = self.client.put_sources(list(full.values())) if full else []
        self._source_ids |= {**dict.fromkeys(new), **dict(zip(full, ids, strict=True))}

    def source_id(self, place: int) -> str | None:
        """What the engine calls a rank's manifest; None if it has none."""
        return self._source_ids.get(place)

    def outdate(self, places: Iterable[int]) -> None:
        """Note that the memory of ranks has moved: they are to offer anew, for a new plan."""
        for place in places:
            self._source_ids.pop(place, None)
            self.plan = None

    def publish_peer(self, manifests: Sequence[bytes]) -> list[str]:
        """Offer another engine's manifests, one for each of its ranks; known ones once."""
        self._peers = {
            manifest: self._peers.get(manifest) or self.client.put_source(manifest)
            for manifest in manifests
        }
        return list(self._peers.values())

    def forget(self) -> None:
        """Drop what the engine said: it restarted, or our manifest changed."""
        self._source_ids, self.plan = {}, None
        self._peers = {}
        self._planned_again = False

    def wanted(
        self,
        source_ids: Sequence[str],
        model: Mapping[str, str | int | bool],
        request: UpdateRequest,
        direction: Direction,
    ) -> Mapping[str, Sequence[str]]:
        """Connect if the sources are new to the engine; what it wants in other dtypes, by dtype.

        If it wants none, the update that follows goes by the plan that was made.

        Raises:
            EnginePluginError: the engine refused, failed or cannot be reached.
        """

        def connected(now: UpdateRequest) -> Mapping[str, Sequence[str]]:
            self._connect(source_ids, model, direction, tell_dtypes=True)
            self._waited_s = request.timeout_s - now.timeout_s
            return {} if self.plan is None else self.plan.wanted

        wanted = once_it_is_free(request, connected)
        if wanted:
            self.plan = None
        return wanted

    def update(
        self,
        source_ids: Sequence[str],
        model: Mapping[str, str | int | bool],
        request: UpdateRequest,
    ) -> UpdateReport:
        """Connect if the sources are new to the engine, then update.

        Raises:
            UpdateEndUnknownError: what became of it cannot be found out.
            EnginePluginError: the engine refused, failed or cannot be reached.
        """

        def connected(request: UpdateRequest) -> UpdateReport:
            self._connect(source_ids, model, "pull")
            return self._carried(request, self.client.update)

        return once_it_is_free(self._shortened(request), connected)

    def prepare(
        self,
        source_ids: Sequence[str],
        model: Mapping[str, str | int | bool],
        request: UpdateRequest,
        direction: Direction,
    ) -> UpdateReport:
        """Connect if the sources are new to the engine, then prepare.

        Raises:
            EnginePluginError: the engine refused, failed or cannot be reached.
        """

        def connected(request: UpdateRequest) -> UpdateReport:
            self._connect(source_ids, model, direction)
            self._until = time.monotonic() + request.timeout_s
            return self._carried(request, self.client.prepare)

        return once_it_is_free(self._shortened(request), connected)

    def commit(self, request: UpdateRequest) -> UpdateReport:
        """Have the engine install what it prepared.

        Raises:
            EnginePluginError: the engine failed or cannot be reached.
        """
        # The engine's deadline runs from prepare, so what is waited for here is what is left of it.
        left = max(self._until - time.monotonic(), LEAST_S)
        request = msgspec.structs.replace(request, timeout_s=left)
        plan, report = self.plan, self._carried(request, self._ask_to_commit)
        pushed = plan is not None and plan.direction == "push" and not plan.direct_bytes
        if pushed and not self._planned_again and request.mode != "staged":
            # What its loader did just now may have shown the engine that bytes can land directly.
            self.plan, self._planned_again = None, True
        return report

    def _shortened(self, request: UpdateRequest) -> UpdateRequest:
        """The request, with the time that it has left after its engine was busy."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return msgspec.structs.replace(request, timeout_s=request.timeout_s - waited_s)

    def _connect(
        self,
        source_ids: Sequence[str],
        model: Mapping[str, str | int | bool],
        direction: Direction,
        *,
        tell_dtypes: bool = False,
    ) -> None:
        if self.plan is None or self._planned != tuple(source_ids):
            self.plan = self.client.connect(
                source_ids, direction=direction, model=model, tell_dtypes=tell_dtypes
            )
            self._planned = tuple(source_ids)

    def _carried(
        self, request: UpdateRequest, ask: Callable[[UpdateRequest], UpdateReport]
    ) -> UpdateReport:
        """One call about an update from the plan; a plan that failed once is made anew.

        Returns only when the engine has finished, or it cannot be found out whether it has.
        """
        if self.plan is not None:
            request = msgspec.structs.replace(request, plan_id=self.plan.plan_id)
        try:
            report = answer_or_end(self.client, request, ask)
        except EnginePluginError:
            self.plan = None  # that costs little
            raise
        if report.outcome in ("failed", "aborted"):
            self.plan = None
            raise _reported(report)
        return report

    def _ask_to_commit(self, request: UpdateRequest) -> UpdateReport:
        return self.client.commit(request.request_id, timeout_s=request.timeout_s)


def for_each_engine(
    links: Iterable[EngineLink], call: Callable[[EngineLink], Result]
) -> dict[str, Result | EnginePluginError]:
    """Call every engine at once, each in a thread; an engine's error is its result.

    The threads are daemons: Ctrl-C in the caller does not wait for a slow engine.
    """
    links = list(links)
    answers: queue.SimpleQueue[tuple[str, Result | BaseException]] = queue.SimpleQueue()

    def run(link: EngineLink) -> None:
        try:
            answers.put((link.url, call(link)))
        except BaseException as error:  # a thread may not end without its answer
            answers.put((link.url, error))

    for link in links:
        threading.Thread(target=run, args=(link,), daemon=True, name=f"update {link.url}").start()
    results: dict[str, Result | EnginePluginError] = {}
    for _ in links:
        url, answer = answers.get()
        if isinstance(answer, BaseException) and not isinstance(answer, EnginePluginError):
            raise answer
        results[url] = answer
    return {link.url: results[link.url] for link in links}


def forgot_us(error: object) -> bool:
    """Say whether an engine no longer knows our source or plan, as after a restart."""
    return isinstance(error, AdminAnswerError) and error.code == UnknownIdError.code


def failure_of(link: EngineLink, error: EnginePluginError, *, where: str = "") -> EngineFailure:
    """Describe a failure together with what the engine says it holds now."""
    detail = error.detail if isinstance(error, AdminAnswerError) else error.message
    # One that has just been asked in vain is asked briefly: the trainer waits to be told.
    silent = isinstance(error, UpdateEndUnknownError | EngineUnreachableError)
    holds = held_by(link.client, timeout_s=SILENT_S if silent else ASKED_S)
    return EngineFailure(code=error.code, detail=where + detail, remedy=error.remedy, holds=holds)


def _reported(report: UpdateReport) -> UpdateFailedError:
    """Turn a report of failure into the error that it tells of."""
    told = report.error or {}
    error = UpdateFailedError(
        told.get("detail", f"the engine reported {report.outcome}"), remedy=told.get("remedy", "")
    )
    error.code = told.get("code", error.code)
    return error
