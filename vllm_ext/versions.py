"""The vLLM releases that this package was probed on, and what it relies on in them."""

from __future__ import annotations

import vllm

from engine_plugins.engine_release import EngineRelease

__all__ = ["VLLM"]

VLLM = EngineRelease(
    engine="vLLM",
    version=vllm.__version__,
    probed=("0.32",),
    hooks={
        "vllm.entrypoints.launchers.app": ("attach_endpoint_plugins",),
        "vllm.engine.arg_utils": ("EngineArgs.create_engine_config",),
        "vllm.v1.engine.core": (
            "EngineCore.preprocess_add_request",
            "EngineCore.reset_prefix_cache",
            "EngineCore._initialize_effective_attention_block_size",
        ),
        "vllm.v1.core.sched.scheduler": (
            "Scheduler.schedule",
            "Scheduler.update_from_output",
            "Scheduler.finish_requests",
            "Scheduler._handle_blocked_waiting_request",
            "Scheduler._get_local_prefix_cache_hit",
            "Scheduler._reserve_prefill_lookahead",
            "Scheduler._free_request",
        ),
        "vllm.v1.worker.gpu_worker": (
            "Worker.load_model",
            "Worker.get_draft_model",
            "Worker.execute_model",
            "Worker.sample_tokens",
        ),
        "vllm.v1.engine.async_llm": (
            "AsyncLLM.check_admission",
            "AsyncLLM.generate",
            "AsyncLLM.pause_generation",
        ),
        "vllm.entrypoints.openai.responses.serving": (
            "OpenAIServingResponses._generate_with_builtin_tools",
        ),
        "vllm.model_executor.model_loader.reload.layerwise": (
            "initialize_layerwise_reload",
            "finalize_layerwise_reload",
            "get_layerwise_info",
            "_layerwise_process",
            "_place_kernel_tensors",
        ),
    },
)
