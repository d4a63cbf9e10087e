"""A small engine's steps, as arithmetic: what they take, and a queue in front of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from engine_plugins.prefill_gate.decision import Decision, Outcome
from engine_plugins.prefill_gate.gate import PrefillGate
from engine_plugins.prefill_gate.memory_cap import Reading
from engine_plugins.prefill_gate.model_memory import AttentionMemory, ModelMemory, ModelSizes
from engine_plugins.prefill_gate.prefill_memory import PrefillMemory
from engine_plugins.prefill_gate.rank_meter import Measured
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from engine_plugins.settings import Settings

MIB = 1 << 20
SIZES = ModelSizes(
    hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128, vocab=151_936
)


def a_memory(
    *, margin_bytes: int = 8 * MIB, itemsize: int = 2, per_context_token: int = 0
) -> PrefillMemory:
    """The predictor of a model of 0.6B parameters on the CPU, which has measured nothing yet."""
    attention = AttentionMemory(per_context_token=per_context_token)
    model = ModelMemory(SIZES, itemsize=itemsize, attention=attention)
    return PrefillMemory(model, margin_quantile=0.99, margin_bytes=margin_bytes)


def true_peak(shape: StepShape, noise: random.Random | None = None) -> float:
    """What its steps take: 40 KiB a token, or 10 bytes a prompt token and word, and 1.1 MiB."""
    layers = 40 * 1024 * shape.tokens
    logits = 4096 * shape.tokens + 18 * SIZES.vocab * shape.rows
    prompt_logits = 4096 * shape.tokens + 10 * SIZES.vocab * shape.prompt_logprob_rows
    peak = max(layers, logits, prompt_logits) + 1.1 * MIB + shape.held_bytes
    return peak + (noise.uniform(-0.25, 0.25) * MIB if noise else 0.0)


def calibrated(memory: PrefillMemory, at: float = 0.0) -> PrefillMemory:
    """After three steps of each of four sizes, plain and with prompt logprobs."""
    noise = random.Random(5)
    for tokens in (1, 16, 64, 256, 1024):
        for logprobs in (False, True):
            candidate = Candidate("c", tokens, tokens, prompt_logprobs=logprobs)
            shape = candidate.joined_to(NOTHING, tokens)
            for _ in range(3):
                memory.observe(shape, true_peak(shape, noise), at=at)
    return memory


def measured_memory(*, per_context_token: int = 0) -> PrefillMemory:
    """That has measured prompts up to 1,024 tokens, and up to 16 decodes at once."""
    memory = calibrated(a_memory(per_context_token=per_context_token))
    for rows in (1, 4, 16):
        shape = StepShape(tokens=rows, rows=rows)
        for _ in range(3):
            memory.observe(shape, true_peak(shape), at=0.0)
    return memory


@dataclass
class SimulatedRanks:
    """Ranks whose room a test sets, and which say how often they were asked for it."""

    room_bytes: int = 1 << 40
    asked: int = 0

    def device_bytes(self) -> int | None:
        """None: they are on the host."""
        return None

    def room(self, configured_cap: int | None) -> int:
        """What the test says, or all of a configured cap."""
        self.asked += 1
        return self.room_bytes if configured_cap is None else configured_cap

    def reading(self, configured_cap: int | None) -> Reading:
        """Of ranks that hold nothing."""
        return Reading(0, self.room_bytes)

    def measured(self) -> list[Measured]:
        """Nothing is."""
        return []


class EngineDiedError(Exception):
    """A step exceeded the cap."""


@dataclass
class Served:
    """One request of the simulation."""

    candidate: Candidate
    decodes: int = 0
    """Tokens that it still decodes once its prompt is done."""
    outcome: Outcome | None = None
    """Its refusal, or `run` when its prompt is done."""
    done_at: float = 0.0


@dataclass
class SimulatedEngine:
    """Runs queued requests under the gate, and dies where a step exceeds the cap.

    Steps take 10 ms. Prompts are computed in chunks of at most `chunk` tokens.
    """

    gate: PrefillGate
    cap_bytes: int
    resting_bytes: int = 1000 * MIB
    chunk: int = 2048
    now: float = 0.0
    waiting: list[Served] = field(default_factory=list)
    running: list[Served] = field(default_factory=list)
    reclaims: int = 0
    noise: random.Random = field(default_factory=lambda: random.Random(7))

    def add(self, candidate: Candidate, *, decodes: int = 0) -> Served:
        """Queue a request."""
        served = Served(candidate, decodes)
        self.waiting.append(served)
        return served

    def step(self) -> list[Decision]:
        """One step: ask for every prefill, run what was let in, learn from it."""
        self.now += 0.01
        decoding = StepShape(tokens=len(self.running), rows=len(self.running))
        reading = Reading(self.resting_bytes, self.cap_bytes)
        self.gate.begin(reading, running=decoding, in_flight=bool(self.running), now=self.now)
        decisions = [self._ask(served) for served in list(self.waiting)]
        for served in list(self.running):
            served.decodes -= 1
            if served.decodes <= 0:
                self.running.remove(served)
        planned = self.gate.planned
        if planned.tokens:
            peak = true_peak(planned, self.noise)
            if self.resting_bytes + peak > self.cap_bytes:
                raise EngineDiedError(f"a step took {peak:.0f} bytes")
            self.gate.observe(planned, round(peak), at=self.now)
        for served in self.waiting:
            if served.outcome == "run" and served.decodes:
                self.running.append(served)
        self.waiting = [served for served in self.waiting if served.outcome is None]
        return decisions

    def run_until_empty(self, limit_s: float = 600.0) -> None:
        """Serve all that is queued and runs."""
        end = self.now + limit_s
        while (self.waiting or self.running) and self.now < end:
            self.step()
        assert not self.waiting, f"{len(self.waiting)} were never served"

    def _ask(self, served: Served) -> Decision:
        candidate = served.candidate
        left = candidate.prompt_tokens - candidate.computed
        wanted = min(left, self.chunk) if candidate.divisible else left
        decision = self.gate.decide(candidate._replace(wanted=wanted))
        if decision.outcome == "reclaim":
            self.reclaims += 1
            self.gate.reclaimed()
        elif decision.outcome in ("too_large", "pressure"):
            served.outcome = decision.outcome
        elif decision.tokens:
            computed = candidate.computed + decision.tokens
            served.candidate = candidate._replace(computed=computed)
            if computed == candidate.prompt_tokens:
                served.outcome = "run"
                self.gate.forget(candidate.request_id)
        if served.outcome is not None:
            served.done_at = self.now
        return decision


def an_engine(
    *, headroom_bytes: int, mode: str = "enforce", measured: bool = True, itemsize: int = 2
) -> SimulatedEngine:
    """With so much free when nothing runs."""
    memory = a_memory(itemsize=itemsize)
    if measured:
        calibrated(memory)
    settings = Settings(prefill_gate=mode, prefill_margin_bytes=8 * MIB)
    gate = PrefillGate(memory, settings, smallest_chunk=64)
    return SimulatedEngine(gate, cap_bytes=1000 * MIB + headroom_bytes)
