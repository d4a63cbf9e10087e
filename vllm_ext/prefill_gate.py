"""The prefill gate of a vLLM engine, made of its configuration."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from engine_plugins.admin.runtime_dir import RUNTIME_DIR
from engine_plugins.engine_release import gate_refusal
from engine_plugins.errors import UnsupportedError
from engine_plugins.prefill_gate.calibration_file import CalibrationKey
from engine_plugins.prefill_gate.engine_gate import (
    EngineGate,
    calibration_file,
    make_engine_gate,
)
from engine_plugins.prefill_gate.entry import EntryKind, GateBoard
from engine_plugins.prefill_gate.model_memory import ModelMemory, ModelSizes
from engine_plugins.prefill_gate.rank_meter import OwnRank, PagedRanks, Ranks
from engine_plugins.prefill_gate.step_shape import StepShape
from engine_plugins.settings import Settings
from vllm_ext.prefill_shapes import held_bytes_per_token
from vllm_ext.scheduler_hook import GatedScheduler
from vllm_ext.step_hook import own_meter, paged_meter

__all__ = ["install_gate", "largest_step", "model_memory"]

SMALLEST_CHUNK = 64
LOGPROB_ROWS_AT_ONCE = 1024
"""Of prompt logprobs, in vLLM's newer model runner."""


def install_gate(core: Any, settings: Settings) -> EngineGate:
    """Make the gate of an engine core and put it in front of the core's scheduler.

    Raises:
        SettingsError: a cap that this machine cannot hold.
        UnsupportedError: the ranks lie where the gate does not see them, or this release lacks
            what it needs.
    """
    refused = gate_refusal()
    if refused is not None:
        raise refused
    config: VllmConfig = core.vllm_config
    _require_one_group(config)
    ranks = _ranks(core.model_executor)
    memory = model_memory(config)
    on_host = current_platform.is_cpu()
    kept = calibration_file(settings, _key(config, memory))
    scheduler = core.scheduler
    gate = make_engine_gate(
        memory,
        settings,
        ranks,
        smallest_chunk=max(SMALLEST_CHUNK, int(scheduler.block_size)),
        largest=largest_step(scheduler),
        entry=EntryKind(
            max_prompt=int(config.model_config.max_model_len),
            divisible=bool(config.scheduler_config.enable_chunked_prefill),
            logprobs_held_bytes=held_bytes_per_token(1) if on_host else 0,
        ),
        samples=kept.read(now=time.time()),
        board=GateBoard(Path(os.environ[RUNTIME_DIR])),
        keep=kept.write,
    )
    GatedScheduler(scheduler, gate, on_host=on_host)
    return gate


def model_memory(config: VllmConfig) -> ModelMemory:
    """What a step of the model should take on one rank."""
    model = config.model_config
    dtype = model.dtype
    vision = getattr(model.hf_config, "vision_config", None)
    return ModelMemory(
        ModelSizes.from_config(model.hf_text_config, vision),
        itemsize=dtype.itemsize if isinstance(dtype, torch.dtype) else 4,
        tp_size=int(config.parallel_config.tensor_parallel_size),
        fused_logprobs=not current_platform.is_cpu(),
        lora_rank=int(config.lora_config.max_lora_rank) if config.lora_config else 0,
        logprob_rows_at_once=LOGPROB_ROWS_AT_ONCE if config.use_v2_model_runner else None,
    )


def largest_step(scheduler: Scheduler) -> StepShape:
    """The most that a scheduler puts into a step, but for rows of logits."""
    tokens = int(scheduler.max_num_scheduled_tokens)
    context = int(scheduler.max_num_running_reqs) * int(scheduler.max_model_len)
    return StepShape(
        tokens=tokens,
        context=context,
        pairs=tokens * int(scheduler.max_model_len),
        lora_tokens=tokens,
    )


def _require_one_group(config: VllmConfig) -> None:
    parallel = config.parallel_config
    found = {
        "data parallelism": parallel.data_parallel_size,
        "pipeline parallelism": parallel.pipeline_parallel_size,
        "several hosts": parallel.nnodes,
    }
    for what, size in found.items():
        if size > 1:
            raise UnsupportedError(
                f"the prefill gate does not know an engine with {what} ({size})",
                remedy="set ENGINE_PLUGINS_PREFILL_GATE to off, or serve with tensor parallelism "
                "on one host",
            )


def _ranks(executor: Any) -> Ranks:
    """The ranks, each with a meter around its steps from now on."""
    if type(executor) is UniProcExecutor:
        (meter,) = executor.collective_rpc(own_meter)
        return OwnRank(meter)
    if isinstance(executor, MultiprocExecutor):
        pages = executor.collective_rpc(paged_meter)
        return PagedRanks([Path(page) for page in pages])
    raise UnsupportedError(
        f"the prefill gate does not see the ranks of vLLM's {type(executor).__name__}",
        remedy="set ENGINE_PLUGINS_PREFILL_GATE to off, or serve with "
        "--distributed-executor-backend mp",
    )


def _key(config: VllmConfig, memory: ModelMemory) -> CalibrationKey:
    attention = config.attention_config.backend
    runner = 2 if config.use_v2_model_runner else 1
    return CalibrationKey(
        model=str(config.model_config.model),
        engine=f"vllm {vllm.__version__}",
        tp_size=int(config.parallel_config.tensor_parallel_size),
        backend=f"{current_platform.device_type}, attention {attention or 'auto'}, "
        f"runner {runner}, eager {config.model_config.enforce_eager}",
        prior=memory.description,
    )
