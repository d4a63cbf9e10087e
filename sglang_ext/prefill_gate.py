"""The prefill gate of an SGLang scheduler: made with it, and the same on every rank.

Each rank has a scheduler of its own, and all have to decide alike. With several ranks the first one
reads the memory of all, and what it read comes to every rank among SGLang's own messages.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import sglang
import torch
import torch.distributed
from sglang.srt.environ import envs
from sglang.utils import TypeBasedDispatcher

from engine_plugins.admin.runtime_dir import RUNTIME_DIR
from engine_plugins.engine_release import GATE, gate_refusal
from engine_plugins.errors import EnginePluginError, UnsupportedError
from engine_plugins.prefill_gate.calibration_file import CalibrationFile, CalibrationKey
from engine_plugins.prefill_gate.engine_gate import (
    EngineGate,
    Samples,
    StepFigures,
    calibration_file,
    make_engine_gate,
    no_gate,
)
from engine_plugins.prefill_gate.entry import EntryKind, GateBoard
from engine_plugins.prefill_gate.model_memory import AttentionMemory, ModelMemory, ModelSizes
from engine_plugins.prefill_gate.rank_meter import (
    OwnRank,
    PagedRanks,
    RankMeter,
    StepOrder,
    rank_page,
)
from engine_plugins.prefill_gate.step_memory import step_memory
from engine_plugins.settings import Settings
from sglang_ext.hooks import missing
from sglang_ext.messages import GateFigures
from sglang_ext.prefill_shapes import HELD_BYTES_PER_LOGPROB, PrefillShapes
from sglang_ext.unasked_steps import UnaskedSteps

__all__ = ["SchedulerGate", "after_pull", "cut_step", "gate_of", "make_scheduler_gate"]

T = TypeVar("T")

SMALLEST_CHUNK = 32
"""Tokens that an idle engine computes of any prompt."""

_ATTRIBUTE = "engine_plugins_gate"
_SCHEDULER = "scheduler"
_of_this_process: dict[str, Any] = {}
"""SGLang's receiver does not know the scheduler that it receives for; a process has one."""
_GATHERING = ("torch_native",)
"""Attention backends that gather a prompt's context before they attend to it."""


class SchedulerGate:
    """The gate of one rank's scheduler.

    Args:
        engine: decides.
        meter: of this rank's memory.
        shapes: of its steps.
        smallest_chunk: tokens that an idle engine computes of any prompt.
        told: whether figures come as messages, because there are several ranks.
    """

    def __init__(
        self,
        engine: EngineGate,
        meter: RankMeter,
        shapes: PrefillShapes,
        *,
        smallest_chunk: int,
        told: bool,
    ) -> None:
        self.engine, self.meter, self.shapes = engine, meter, shapes
        self.smallest_chunk = smallest_chunk
        self.deferred: set[str] = set()
        """Requests that were told to wait, by id."""
        self.unasked = UnaskedSteps(engine.clearance)
        self.told = told
        self._latest: StepFigures | None = None
        self._idle = True

    @property
    def sends_figures(self) -> bool:
        """Whether other ranks wait for what the first one reads."""
        return self.told and self.engine.is_on

    def take(self, message: GateFigures) -> None:
        """The first rank's figures have come."""
        self._latest = StepFigures(*message.figures)

    def figures(self) -> StepFigures | None:
        """To begin a step with; the same on all ranks."""
        return self._latest if self.told else self.engine.figures()

    def order(self, scheduler: Any, batch: Any) -> StepOrder:
        """What is to be done about a batch that runs now."""
        requests = len(batch.reqs) + len(scheduler.waiting_queue)
        if scheduler.running_batch is not batch:
            requests += len(scheduler.running_batch.reqs)
        rows = min(requests, scheduler.max_running_requests)
        return self.engine.order(self.shapes.batch(batch), rows=rows)

    def forget_gone(self, scheduler: Any, *, idle: bool) -> None:
        """Of those who waited some may have been aborted."""
        gone: set[str] = set()
        if self.deferred:
            gone = self.deferred.difference(request.rid for request in scheduler.waiting_queue)
            self.deferred -= gone
        if gone or (idle and not self._idle):
            self.engine.forget(sorted(gone), idle=idle)
        self._idle = idle


def gate_of(scheduler: Any) -> SchedulerGate | None:
    """The gate of a scheduler; `None` before it has been made."""
    gate: SchedulerGate | None = getattr(scheduler, _ATTRIBUTE, None)
    return gate


class _Parts(NamedTuple):
    """What a rank makes by itself of its gate."""

    meter: RankMeter
    model: ModelMemory
    file: CalibrationFile
    shapes: PrefillShapes
    smallest_chunk: int


def make_scheduler_gate(scheduler: Any, settings: Settings) -> EngineGate:
    """Make a scheduler's gate, on all ranks at the same time, and have the scheduler ask it.

    Ranks agree before any waits for the others: one that failed alone would never be joined.

    Raises:
        SettingsError: a cap that this machine cannot hold.
        UnsupportedError: there can be no gate here, and why.
    """
    group = scheduler.tp_cpu_group
    parts = _all_or_none(lambda: _parts(scheduler, settings), group)
    samples = _from_first_rank(lambda: parts.file.read(now=time.time()), group)
    gate = _all_or_none(lambda: _gate_of_parts(scheduler, settings, parts, samples), group)
    setattr(scheduler, _ATTRIBUTE, gate)
    _of_this_process[_SCHEDULER] = scheduler
    scheduler._request_dispatcher += TypeBasedDispatcher([(GateFigures, gate.take)])
    return gate.engine


def _all_or_none(make: Callable[[], T], group: torch.distributed.ProcessGroup) -> T:
    """What this rank makes, if all ranks make theirs.

    Raises:
        EnginePluginError: this rank's own reason, or else that of another.
    """
    made: T | None = None
    reason: EnginePluginError | None = None
    try:
        made = make()
    except Exception as error:
        reason = no_gate(error)
    told = _of_all_ranks(None if reason is None else reason.message, group)
    others = [each for each in told if each is not None]
    if reason is not None:
        raise reason
    if others:
        raise UnsupportedError(others[0], remedy="see the server's log")
    return cast(T, made)


def _parts(scheduler: Any, settings: Settings) -> _Parts:
    refused = gate_refusal()
    if refused is not None:
        raise refused
    _require_hooks()
    group = scheduler.tp_cpu_group
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    runner = scheduler.tp_worker.model_runner
    model = _model_memory(runner, ranks)
    return _Parts(
        meter=RankMeter(
            step_memory(torch.device(runner.device), ranks=ranks),
            rank_page(Path(os.environ[RUNTIME_DIR]), rank) if ranks > 1 else None,
        ),
        model=model,
        file=_calibration(scheduler, settings, ranks, model),
        shapes=PrefillShapes(one_by_one=_backend(runner) in _GATHERING),
        smallest_chunk=_smallest_chunk(scheduler),
    )


def _require_hooks() -> None:
    # Late: it has our hooks, which are made of this module.
    from sglang_ext.gate_hooks import apply_gate_hooks

    apply_gate_hooks()
    if lost := missing(GATE):
        raise UnsupportedError(
            f"SGLang did not take the hooks on {', '.join(lost)}", remedy="see the server's log"
        )


def _gate_of_parts(
    scheduler: Any, settings: Settings, parts: _Parts, samples: Samples
) -> SchedulerGate:
    group = scheduler.tp_cpu_group
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    first, told = rank == 0, ranks > 1
    runtime_dir = Path(os.environ[RUNTIME_DIR])
    pages = [rank_page(runtime_dir, each) for each in range(ranks)]
    engine = make_engine_gate(
        parts.model,
        settings,
        PagedRanks(pages) if told else OwnRank(parts.meter),
        smallest_chunk=parts.smallest_chunk,
        largest=None if told else parts.shapes.largest(scheduler),
        entry=EntryKind(
            max_prompt=min(scheduler.model_config.context_len, scheduler.max_total_num_tokens),
            divisible=scheduler.chunked_prefill_size is not None,
            logprobs_held_bytes=2 * HELD_BYTES_PER_LOGPROB,
        ),
        samples=samples,
        board=GateBoard(runtime_dir) if first else None,
        keep=parts.file.write if first else None,
    )
    return SchedulerGate(
        engine, parts.meter, parts.shapes, smallest_chunk=parts.smallest_chunk, told=told
    )


def after_pull(pulled: list[Any] | None, receiver: Any) -> list[Any] | None:
    """After `SchedulerRequestReceiver._pull_raw_reqs`: figures, if there is anything to decide.

    What the first rank has pulled goes to all ranks; the others have pulled nothing, which is None.
    """
    scheduler = _of_this_process.get(_SCHEDULER)
    if pulled is None or scheduler is None:
        return pulled
    gate = gate_of(scheduler)
    if gate is None or not gate.sends_figures:
        return pulled
    compiling = scheduler.grammar_manager.grammar_queue
    if pulled or scheduler.waiting_queue or scheduler.chunked_req is not None or compiling:
        return [*pulled, GateFigures(figures=gate.engine.figures())]
    return pulled


def _of_all_ranks(value: str | None, group: torch.distributed.ProcessGroup) -> list[str | None]:
    """What each rank says."""
    told: list[str | None] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(told, value, group=group)
    return told


def _from_first_rank(read: Callable[[], Samples], group: torch.distributed.ProcessGroup) -> Samples:
    """What the first rank reads, on all; once they have it, all ranks have come this far."""
    values: list[Any] = [None]
    if torch.distributed.get_rank(group) == 0:
        values = [read()]
    source = torch.distributed.get_global_rank(group, 0)
    torch.distributed.broadcast_object_list(values, src=source, group=group)
    torch.distributed.barrier(group)
    samples: Samples = values[0]
    return samples


def _model_memory(runner: Any, ranks: int) -> ModelMemory:
    config = runner.model_config
    sizes = ModelSizes.from_config(
        config.hf_text_config, getattr(config.hf_config, "vision_config", None)
    )
    itemsize = config.dtype.itemsize
    attention = AttentionMemory()
    if _backend(runner) in _GATHERING:
        # Queries and outputs as long as the context, and its keys and values.
        heads = 2 * sizes.heads + 2 * sizes.kv_heads
        attention = AttentionMemory(per_context_token=heads * sizes.head_dim * itemsize // ranks)
    return ModelMemory(
        sizes,
        itemsize=itemsize,
        tp_size=ranks,
        attention=attention,
        fused_logprobs=runner.device != "cpu",
        lora_rank=int(runner.server_args.max_lora_rank or 0),
        logprob_rows_at_once=(
            envs.SGLANG_LOGPROB_CHUNK_SIZE.get() if envs.SGLANG_ENABLE_LOGPROB_CHUNK.get() else None
        ),
    )


def _calibration(
    scheduler: Any, settings: Settings, ranks: int, model: ModelMemory
) -> CalibrationFile:
    runner = scheduler.tp_worker.model_runner
    key = CalibrationKey(
        model=str(scheduler.server_args.model_path),
        engine=f"sglang {sglang.__version__}",
        tp_size=ranks,
        backend=f"{runner.device} {_backend(runner)}",
        prior=model.description,
    )
    return calibration_file(settings, key)


def _backend(runner: Any) -> str:
    return str(runner.server_args.attention_backend)


def _smallest_chunk(scheduler: Any) -> int:
    """Such that SGLang can cut it from a prompt."""
    step = cut_step(scheduler)
    return -(-SMALLEST_CHUNK // step) * step


def cut_step(scheduler: Any) -> int:
    """What the length of a chunk has to be a multiple of."""
    return math.lcm(scheduler.page_size, scheduler.truncation_align_size or 1)
