"""The gate at the door: what an API process may refuse before an answer begins.

The gate itself sits with the engine's scheduler. It publishes limits, and whoever takes requests
compares: so a stream is refused by its status, not after a 200.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine_plugins.errors import EnginePluginError, MemoryPressureError, PromptTooLargeError
from engine_plugins.prefill_gate.gate import MAX_WAIT_S, PrefillGate
from engine_plugins.prefill_gate.gate_report import GateReport
from engine_plugins.prefill_gate.step_shape import Candidate
from engine_plugins.shared_page import SharedPage

__all__ = [
    "LIMITS_LAST_S",
    "EntryKind",
    "EntryLimits",
    "GateBoard",
    "GateStatus",
    "entry_limits",
    "refusal_at_entry",
]

LIMITS_LAST_S = 10.0
"""After which limits refuse nobody at the door: whoever comes then is judged by the scheduler."""
_PAGE_BYTES = 128 << 10


@dataclass(frozen=True, kw_only=True)
class EntryKind:
    """What an engine takes.

    Attributes:
        max_prompt: tokens of a prompt that it accepts at all.
        divisible: whether it cuts prompts into chunks.
        logprobs_held_bytes: what prompt logprobs keep per token of the prompt.
    """

    max_prompt: int
    divisible: bool
    logprobs_held_bytes: int


class EntryLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler tells the API processes.

    Attributes:
        enforced: whether anything is refused.
        largest_prompt: tokens of the largest prompt that can ever run.
        largest_with_logprobs: the same of a prompt whose log-probabilities are asked for.
        waiting_s: seconds that the first in line has waited for memory.
        retry_after_s: when it is worth to try again.
        at: seconds of this host's monotonic clock, which is the same in every process and which
            nobody sets back. The scheduler says nothing while the engine is idle, and memory may
            have come free since.
    """

    enforced: bool
    largest_prompt: int
    largest_with_logprobs: int
    waiting_s: float = 0.0
    retry_after_s: int = 1
    at: float = 0.0


class GateStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler last said of its gate."""

    limits: EntryLimits
    report: GateReport


class GateBoard:
    """Where a scheduler tells the other processes of its server about its gate.

    Args:
        runtime_dir: of the server.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self._path = runtime_dir / "gate" / "board.page"
        self._page: SharedPage | None = None
        self._last: tuple[int, GateStatus | None] = (0, None)

    def publish(self, limits: EntryLimits, report: GateReport) -> None:
        """Replace what is said; one scheduler alone does so."""
        if self._page is None:
            SharedPage.create(self._path, nbytes=_PAGE_BYTES)
            self._page = SharedPage(self._path)
        self._page.write(msgspec.msgpack.encode(GateStatus(limits=limits, report=report)))

    def read(self) -> GateStatus | None:
        """The newest; `None` before the scheduler has said anything."""
        if self._page is None:
            if not self._path.exists():
                return None
            self._page = SharedPage(self._path)
        if self._page.sequence != self._last[0]:
            sequence, body = self._page.read()
            self._last = (sequence, msgspec.msgpack.decode(body, type=GateStatus))
        return self._last[1]


def entry_limits(gate: PrefillGate, kind: EntryKind) -> EntryLimits:
    """The limits as of now. Predicts a few dozen times: make it now and then, not at every step."""
    plain = Candidate("", kind.max_prompt, kind.max_prompt, divisible=kind.divisible)
    with_logprobs = plain._replace(
        prompt_logprobs=True, held_bytes_per_token=kind.logprobs_held_bytes
    )
    return EntryLimits(
        enforced=gate.refuses,
        largest_prompt=gate.largest_prompt(plain),
        largest_with_logprobs=gate.largest_prompt(with_logprobs),
        waiting_s=gate.longest_wait_s(),
        retry_after_s=gate.retry_after_s(),
        at=time.monotonic(),
    )


def refusal_at_entry(
    limits: EntryLimits, *, prompt_tokens: int, prompt_logprobs: bool
) -> EnginePluginError | None:
    """Why a request is refused before its answer begins; `None` lets it in."""
    if not limits.enforced or time.monotonic() - limits.at > LIMITS_LAST_S:
        return None
    largest = limits.largest_with_logprobs if prompt_logprobs else limits.largest_prompt
    if prompt_tokens > largest:
        kind = "a prompt with log-probabilities" if prompt_logprobs else "a prompt"
        return PromptTooLargeError(
            f"{kind} of {prompt_tokens} tokens can never run here: {largest} fit",
            remedy=f"send at most {largest} tokens",
            largest_prompt=largest,
        )
    if limits.waiting_s >= MAX_WAIT_S:
        return MemoryPressureError(
            f"requests have been waiting for memory for {limits.waiting_s:.0f} s",
            remedy=f"try again after {limits.retry_after_s} s",
            retry_after_s=limits.retry_after_s,
        )
    return None
