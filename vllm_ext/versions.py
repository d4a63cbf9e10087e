"""The vLLM releases that this package was probed on, and what it relies on in them."""

from __future__ import annotations

from importlib import import_module

import vllm

from engine_plugins.errors import UnsupportedError

__all__ = ["PROBED", "check_vllm"]

PROBED = ("0.32",)
"""Releases on which every hook below was run, not read."""

_HOOKS = {
    "vllm.v1.engine.core": ("EngineCore.preprocess_add_request", "EngineCore.reset_prefix_cache"),
    "vllm.v1.engine.async_llm": ("AsyncLLM.check_admission", "AsyncLLM.pause_generation"),
    "vllm.model_executor.model_loader.reload.layerwise": (
        "initialize_layerwise_reload",
        "finalize_layerwise_reload",
        "get_layerwise_info",
        "_layerwise_process",
    ),
}


def check_vllm(*modules: str) -> None:
    """Check that what we rely on is where we expect it.

    Raises:
        UnsupportedError: names the hook that is missing and the releases that have it.
    """
    for module in modules:
        for path in _HOOKS[module]:
            found: object = import_module(module)
            for part in path.split("."):
                found = getattr(found, part, None)
            if found is None:
                raise UnsupportedError(
                    f"vLLM {vllm.__version__} has no {module}.{path}, which engine-plugins needs",
                    remedy=f"use vLLM {', '.join(PROBED)}, or a newer engine-plugins",
                )
