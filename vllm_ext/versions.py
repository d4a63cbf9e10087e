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
        ),
        "vllm.v1.worker.gpu_worker": ("Worker.load_model", "Worker.get_draft_model"),
        "vllm.v1.engine.async_llm": ("AsyncLLM.check_admission", "AsyncLLM.pause_generation"),
        "vllm.model_executor.model_loader.reload.layerwise": (
            "initialize_layerwise_reload",
            "finalize_layerwise_reload",
            "get_layerwise_info",
            "_layerwise_process",
            "_place_kernel_tensors",
        ),
    },
)
