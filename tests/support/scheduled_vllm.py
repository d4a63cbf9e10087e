"""vLLM's own scheduler behind the gate, and a made-up model that says 7."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from engine_plugins.prefill_gate.engine_gate import EngineGate, make_engine_gate
from engine_plugins.prefill_gate.entry import EntryKind, GateBoard
from engine_plugins.prefill_gate.model_memory import ModelMemory, ModelSizes
from engine_plugins.prefill_gate.rank_meter import Ranks
from engine_plugins.settings import Settings
from tests.support.megatron_hf import dense_config
from vllm_ext.held_stream import marked_as_held
from vllm_ext.lost_step import lose
from vllm_ext.prefill_gate import largest_step
from vllm_ext.scheduler_hook import GatedScheduler

__all__ = ["BLOCK", "BUDGET", "ScheduledVllm", "scheduled_vllm"]

BLOCK, BUDGET, BLOCKS = 16, 1024, 2048
CONTEXT = 4096


@dataclass
class ScheduledVllm:
    """A scheduler behind its gate, and what it has put out."""

    scheduler: Scheduler
    gated: GatedScheduler
    gate: EngineGate
    board: GateBoard
    outputs: list[EngineCoreOutput] = field(default_factory=list)

    def add(
        self, name: str, prompt: Sequence[int], *, max_tokens: int = 4, **params: Any
    ) -> Request:
        """Queue a request; `held` says that its answer is."""
        kind = params.pop("output_kind", RequestOutputKind.FINAL_ONLY)
        held = params.pop("held", False)
        sampling = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, output_kind=kind, **params
        )
        if held:
            sampling = marked_as_held(sampling)
        request = Request(
            name,
            list(prompt),
            sampling,
            None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.scheduler.add_request(request)
        return request

    def step(self, *, lost: bool = False, not_loaded: Iterable[int] = ()) -> dict[str, int]:
        """One step; the tokens of each request that it computed.

        Args:
            lost: the rank runs out of memory.
            not_loaded: blocks whose KV a connector could not load.
        """
        output = self.scheduler.schedule()
        made = self._lost(output) if lost else self._made(output)
        if blocks := set(not_loaded):
            made.kv_connector_output = KVConnectorOutput(invalid_block_ids=blocks)
        for each in self.scheduler.update_from_output(output, made).values():
            self.outputs += each.outputs
        self.last = output
        return dict(output.num_scheduled_tokens)

    def _made(self, output: SchedulerOutput) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        sampled = [[] if self.scheduler.requests[name].is_prefill_chunk else [7] for name in names]
        places = {name: place for place, name in enumerate(names)}
        return ModelRunnerOutput(names, places, sampled_token_ids=sampled)

    def _lost(self, output: SchedulerOutput) -> ModelRunnerOutput:
        class Runner:
            execute_model_state: object = "begun"

        return lose(Runner(), output)

    def said(self, name: str) -> list[int]:
        """The tokens of a request."""
        return [
            token
            for output in self.outputs
            if output.request_id == name
            for token in output.new_token_ids
        ]

    def end(self, name: str) -> EngineCoreOutput:
        """The last output of a request."""
        return next(each for each in self.outputs if each.request_id == name and each.finish_reason)


def scheduled_vllm(
    folder: Path,
    ranks: Ranks,
    *,
    mode: str,
    places: int = 8,
    **arguments: Any,
) -> ScheduledVllm:
    """A scheduler of a model of random sizes, in `folder`, for `places` requests at once."""
    served = {
        **dense_config(),
        "architectures": ["Qwen3ForCausalLM"],
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(served))
    (folder / "gate").mkdir()
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=CONTEXT,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=places,
        **arguments,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    init_none_hash(sha256)
    scheduler = Scheduler(
        config,
        KVCacheConfig(
            num_blocks=BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        StructuredOutputManager(config),
        BLOCK,
        log_stats=False,
    )
    sizes = ModelSizes(
        hidden=1024, intermediate=4096, heads=16, kv_heads=16, head_dim=64, vocab=32_768
    )
    board = GateBoard(folder)
    gate = make_engine_gate(
        ModelMemory(sizes, itemsize=4),
        Settings(prefill_gate=mode, prefill_margin_bytes=1 << 20),
        ranks,
        smallest_chunk=64,
        largest=largest_step(scheduler),
        entry=EntryKind(max_prompt=CONTEXT, divisible=True, logprobs_held_bytes=20),
        samples={},
        board=board,
        keep=None,
    )
    gated = GatedScheduler(scheduler, gate, on_host=True)
    return ScheduledVllm(scheduler, gated, gate, board)
