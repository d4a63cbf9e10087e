"""The trainer's processes as one: steps that succeed on every rank or fail on every rank.

Without this, a rank that raises leaves the others waiting in their next collective. What ranks
tell each other is msgpack, not pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Generic, TypeVar

import msgspec
import torch
import torch.distributed as dist

from engine_plugins import errors
from engine_plugins.errors import AdminAnswerError, EnginePluginError, UpdateFailedError

__all__ = ["MAX_WAIT_S", "TrainerRanks"]

MAX_WAIT_S = 7200.0
"""Longest that ranks wait for each other; a dead rank is noticed at once by its connection."""

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
    group of its own carries them, so that the trainer's NCCL streams are left alone.

    Args:
        process_group: the ranks that take part; by default all of them.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._group: dist.ProcessGroup | None = None
        self._members = [0]
        self.global_rank = 0
        if dist.is_available() and dist.is_initialized():
            self._members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
            self.global_rank = dist.get_rank()
        self.count = len(self._members)
        if self.count > 1:
            self._group = dist.new_group(
                self._members,
                backend="gloo",
                timeout=timedelta(seconds=MAX_WAIT_S),
                use_local_synchronization=True,
            )

    @property
    def members(self) -> list[int]:
        """Global ranks of the processes that update together."""
        return list(self._members)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that drives the engines."""
        return self.global_rank == self._members[0]

    def agree(self, doing: str, step: Callable[[], Value], kind: Any) -> list[Value]:
        """Run a step on every rank, and give each rank every rank's result.

        Args:
            doing: what the step does, for the error.
            step: plain data out; may raise anything.
            kind: the type of the step's result, which msgspec must know.

        Returns:
            One value per rank, in the group's order.

        Raises:
            EnginePluginError: the step failed somewhere. Every rank raises the same class and
                text, which names the first rank that failed.
            KeyboardInterrupt: where it came; the other ranks are told.
        """
        if self._group is None:
            return [step()]
        mine: _Outcome[Value]
        cause: Exception | None = None
        try:
            mine = _Outcome(step(), None)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            cause = error
            mine = _Outcome(None, _tell(error))
        except BaseException as error:  # Ctrl-C too: they would wait for long
            with suppress(UpdateFailedError):
                self._gather(msgspec.msgpack.encode(_Outcome(None, _tell(error))))
            raise
        answers = self._gather(msgspec.msgpack.encode(mine))
        told = _Outcome[kind]
        outcomes: list[_Outcome[Value]] = [
            msgspec.msgpack.decode(answer, type=told) for answer in answers
        ]
        self._raise_if_any(doing, [outcome.failure for outcome in outcomes], cause)
        return [outcome.value for outcome in outcomes]  # type: ignore[misc]

    def lead(self, doing: str, step: Callable[[], Value], kind: type[Value]) -> Value:
        """Run a step on the leading rank alone, and give its result to all; see `agree`."""
        first = self.agree(doing, lambda: step() if self.leads else None, kind | None)[0]
        if first is None:
            raise UpdateFailedError(f"{doing}: the leading rank gave no result")
        return first

    def close(self) -> None:
        """Leave the group. Repeating it does nothing."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    def _gather(self, mine: bytes) -> list[bytes]:
        """Give every rank the bytes of all."""
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in self._members]
            dist.all_gather(sizes, torch.tensor([len(mine)]), group=self._group)
            longest = max(int(size) for size in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
            parts = [torch.empty_like(padded) for _ in self._members]
            dist.all_gather(parts, padded, group=self._group)
        except RuntimeError as error:  # gloo's only class: a rank died, or waited too long
            raise UpdateFailedError(
                f"trainer rank {self.global_rank} lost the other trainer ranks: {error}",
                remedy="look for the rank that ended first; its own error is the cause",
            ) from error
        return [
            part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)
        ]

    def _raise_if_any(
        self, doing: str, failures: list[_Failure | None], cause: Exception | None
    ) -> None:
        failed = [(rank, told) for rank, told in zip(self._members, failures, strict=True) if told]
        if not failed:
            return
        rank, told = failed[0]
        more = f" ({len(failed)} ranks failed)" if len(failed) > 1 else ""
        kind = getattr(errors, told.kind, UpdateFailedError)
        raise kind(
            f"{doing} failed on trainer rank {rank} of {self.count}{more}: {told.message}",
            remedy=told.remedy,
        ) from cause


def _tell(error: BaseException) -> _Failure:
    """Say an error so that another process can raise its like."""
    if isinstance(error, EnginePluginError):
        plain = type(error).__name__ in errors.__all__ and not isinstance(error, AdminAnswerError)
        kind = type(error).__name__ if plain else UpdateFailedError.__name__
        return _Failure(kind, error.message, error.remedy)
    return _Failure(UpdateFailedError.__name__, f"{type(error).__name__}: {error}", "")
