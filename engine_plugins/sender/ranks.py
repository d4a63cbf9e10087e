"""The trainer's processes as one: steps that succeed on every rank or fail on every rank.

Without this, a rank that raises leaves the others waiting in their next collective. What ranks
tell each other is msgpack, not pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import msgspec
import torch.distributed as dist

from engine_plugins import errors
from engine_plugins.errors import AdminAnswerError, EnginePluginError, UpdateFailedError
from engine_plugins.sender.rank_wire import Buffer, CutOffError, RankWire
from engine_plugins.sender.roll_call import meet, members_of

__all__ = ["MAX_WAIT_S", "STEP_WAIT_S", "TrainerRanks"]

STEP_WAIT_S = 1800.0
"""For all ranks to come to an update: as long as torch's own gloo groups wait. One rank may save a
checkpoint or evaluate meanwhile."""
MAX_WAIT_S = 7200.0
"""For the others within an update, where the engines' own deadlines end what is waited for."""
BATCH_BYTES = 16 << 20
"""Of what the leading rank collects, the most that it holds at once, or one rank's. What it does
with them may take this for every engine again."""

Value = TypeVar("Value")


class _Failure(msgspec.Struct, frozen=True):
    kind: str
    message: str
    remedy: str


class _Outcome(msgspec.Struct, Generic[Value], frozen=True):
    value: Value | None
    failure: _Failure | None


class TrainerRanks:
    """The processes that update together; one process when torch.distributed is not in use.

    Creating and every method are collective: each rank calls them in the same order. A gloo
    group of its own carries them, so that the trainer's NCCL streams are left alone. After a rank
    has left (Ctrl-C, or what it raised outside of these steps) the ranks meet anew in the next.

    Args:
        process_group: the ranks that take part; by default all of them.
        meet_timeout_s: how long they wait for each other now.

    Raises:
        SettingsError: this process is not of the process group.
        UpdateFailedError: a rank did not come; the text names it.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        meet_timeout_s: float = 60.0,
    ) -> None:
        self._members = members_of(process_group)
        self.count = len(self._members)
        self.global_rank = dist.get_rank() if self.count > 1 else self._members[0]
        self._meet_timeout_s = meet_timeout_s
        self._wire: RankWire | None = None
        self._known: BaseException | None = None
        """What was raised last of which every rank knows."""
        if self.count > 1:
            self._meet(meet_timeout_s)

    @property
    def members(self) -> list[int]:
        """Global ranks of the processes that update together."""
        return list(self._members)

    @property
    def place(self) -> int:
        """This process's place among the members."""
        return self._members.index(self.global_rank)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that drives the engines."""
        return self.global_rank == self._members[0]

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Tell the others of whatever ends the block on this rank, unless every rank knows."""
        try:
            yield
        except BaseException as error:
            if error is not self._known:
                self._leave(doing, error)
            raise

    def agree(
        self,
        doing: str,
        step: Callable[[], Value],
        kind: Any,
        *,
        judge: Callable[[list[Value]], object] | None = None,
        between_steps: bool = False,
    ) -> list[Value]:
        """Run a step on every rank, and give each rank every rank's result.

        Args:
            doing: what the step does, for the error.
            step: plain data out, and little of it; may raise anything.
            kind: the type of the step's result, which msgspec must know.
            judge: looks at all results; what it raises it raises on every rank.
            between_steps: whether the others may compute meanwhile: who is late is warned about
                after `meet_timeout_s`, and given up after `STEP_WAIT_S`.

        Returns:
            One value per rank, in the group's order.

        Raises:
            EnginePluginError: the step failed somewhere. Every rank raises the same class and
                text, which names the first rank that failed.
            KeyboardInterrupt, SystemExit: where it came, at once; the other ranks are told.
        """
        if self.count == 1:
            values = [step()]
        else:
            cause, mine = self._tried(doing, step)
            wait_s = STEP_WAIT_S if between_steps else MAX_WAIT_S
            with self._hearing(doing):
                wire = self._wired(wait_s)
                answers = wire.all_gather(mine, wait_s=wait_s, steps=between_steps)
            told = _Outcome[kind]
            outcomes: list[_Outcome[Value]] = [
                msgspec.msgpack.decode(answer, type=told) if answer else _Outcome(None, None)
                for answer in answers
            ]
            self._raise_if_any(doing, [outcome.failure for outcome in outcomes], cause)
            values = [outcome.value for outcome in outcomes]  # type: ignore[misc]
        if judge is not None:
            try:
                judge(values)
            except EnginePluginError as error:
                self._known = error
                raise
        return values

    def lead(self, doing: str, step: Callable[[], Value], kind: Any) -> Value:
        """Run a step on the leading rank alone, and give its result to all; see `agree`.

        What it gives is sent once to each rank, however much it is.
        """
        if self.count == 1:
            return step()
        cause: Exception | None = None
        mine: bytearray = bytearray()
        value: list[Value] = []

        def kept() -> Value:
            value.append(step())
            return value[0]

        if self.leads:
            cause, mine = self._tried(doing, kept)
        with self._hearing(doing):
            told = self._wired(MAX_WAIT_S).broadcast(mine, wait_s=MAX_WAIT_S)
        if self.leads and cause is None:
            return value[0]
        outcome: _Outcome[Value] = _Outcome(None, None)
        if told:
            outcome = msgspec.msgpack.decode(told, type=_Outcome[kind])
        failures = [outcome.failure, *[None] * (self.count - 1)]
        self._raise_if_any(doing, failures, cause)
        return outcome.value  # type: ignore[return-value]

    def deal(self, doing: str, step: Callable[[], Sequence[Value]], kind: Any) -> Value:
        """Run a step on the leading rank alone, and give each rank its own part of the result.

        Args:
            doing: what the step does, for the error.
            step: one value for each rank, in the group's order.
            kind: the type of each.

        Raises:
            EnginePluginError: as for `agree`.
        """
        if self.count == 1:
            return step()[0]
        parts: list[bytearray] = []

        def encoded() -> list[int]:
            parts.extend(_packed(value) for value in step())
            return [len(part) for part in parts]

        sizes = self.lead(doing, encoded, list[int])
        with self._hearing(doing):
            mine = self._wired(MAX_WAIT_S).send_to_each(parts, sizes)
        value: Value = msgspec.msgpack.decode(mine, type=kind)
        return value

    def collect(
        self,
        doing: str,
        step: Callable[[], bytes],
        take: Callable[[Mapping[int, Buffer]], None],
        *,
        most: int,
    ) -> None:
        """Run a step on every rank, and have the leading rank take the results, batch by batch.

        Args:
            doing: what both do, for the error.
            step: bytes, of any length; none are nothing to take.
            take: given results by the ranks' places in the group, in order; called on the leading
                rank alone, and again until all have been taken. It holds `BATCH_BYTES` of them, or
                those of one rank.
            most: results in a batch.

        Raises:
            EnginePluginError: as for `agree`.
        """
        mine: list[bytes] = []

        def kept() -> int:
            mine.append(step())
            return len(mine[0])

        sizes = self.agree(doing, kept, int)
        if self.count == 1:
            if sizes[0]:
                take({0: mine[0]})
            return
        for batch in _batches(sizes, most):
            # Only the leading rank's word starts a batch: who sends finds it waiting.
            got: dict[int, Buffer] = {}
            with self._hearing(doing):
                got.update(self._wired(MAX_WAIT_S).to_leader(mine[0], batch))
            self.lead(doing, partial(take, got), None)

    def close(self) -> None:
        """Leave the group. Repeating it does nothing."""
        self._wire = None

    def _meet(self, wait_s: float) -> RankWire:
        meeting = meet(self._members, self.global_rank, wait_s=wait_s)
        self._wire = RankWire(
            meeting, self._members, self.global_rank, warn_after_s=self._meet_timeout_s
        )
        return self._wire

    def _wired(self, wait_s: float) -> RankWire:
        return self._wire or self._meet(min(wait_s, STEP_WAIT_S))

    def _tried(self, doing: str, step: Callable[[], object]) -> tuple[Exception | None, bytearray]:
        """What to tell of a step, and what it raised; an interrupt does not wait for the others."""
        try:
            value = step()
            return None, bytearray() if value is None else _packed(_Outcome(value, None))
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            return error, _packed(_Outcome(None, _tell(error)))
        except BaseException as error:
            self._leave(doing, error)
            raise

    @contextmanager
    def _hearing(self, doing: str) -> Iterator[None]:
        """What goes on between ranks: the group is done with once it fails."""
        try:
            yield
        except CutOffError as error:
            self._wire = None
            self._heard(error)
        except EnginePluginError as error:
            self._leave(doing, error)
            self._known = error
            raise

    def _heard(self, error: CutOffError) -> NoReturn:
        told = msgspec.json.decode(error.told, type=_Failure)
        self._raise(told, told.message, error)

    def _leave(self, doing: str, error: BaseException) -> None:
        """Tell the others, whatever they wait for, that this rank does not go on."""
        wire, self._wire = self._wire, None
        self._known = error
        if wire is not None:
            told = _tell(error)
            message = f"{doing} failed on trainer rank {self.global_rank} of {self.count}: "
            told = msgspec.structs.replace(told, message=message + told.message)
            wire.leave(msgspec.json.encode(told).decode())

    def _raise_if_any(
        self, doing: str, failures: list[_Failure | None], cause: Exception | None
    ) -> None:
        failed = [(rank, told) for rank, told in zip(self._members, failures, strict=True) if told]
        if not failed:
            return
        rank, told = failed[0]
        more = f" ({len(failed)} ranks failed)" if len(failed) > 1 else ""
        where = f"{doing} failed on trainer rank {rank} of {self.count}{more}: "
        self._raise(told, where + told.message, cause)

    def _raise(self, told: _Failure, message: str, cause: BaseException | None) -> NoReturn:
        error: EnginePluginError = getattr(errors, told.kind, UpdateFailedError)(
            message, remedy=told.remedy
        )
        self._known = error
        raise error from cause


def _packed(value: object) -> bytearray:
    packed = bytearray()
    msgspec.msgpack.Encoder().encode_into(value, packed)
    return packed


def _batches(sizes: Sequence[int], most: int) -> Iterator[dict[int, int]]:
    """Sizes by places, of some neighbours each: below a bound together, or of one alone."""
    batch: dict[int, int] = {}
    for place, size in enumerate(sizes):
        full = len(batch) == most or sum(batch.values()) + size > BATCH_BYTES
        if batch and size and full:
            yield batch
            batch = {}
        if size:
            batch[place] = size
    if batch:
        yield batch


def _tell(error: BaseException) -> _Failure:
    """Say an error so that another process can raise its like."""
    if isinstance(error, EnginePluginError):
        plain = type(error).__name__ in errors.__all__ and not isinstance(error, AdminAnswerError)
        kind = type(error).__name__ if plain else UpdateFailedError.__name__
        return _Failure(kind, error.message, error.remedy)
    return _Failure(UpdateFailedError.__name__, f"{type(error).__name__}: {error}", "")
