"""The general plugin: loaded by vLLM in every process, before anything is built.

The first process lays out the runtime directory; then each process gets the hooks that belong
to it. Nothing here may keep a server from starting that did not ask for us.
"""

from __future__ import annotations

import logging
import sys

from vllm_ext.hooks import install

__all__ = ["register"]


def register() -> None:
    """Entry point of group `vllm.general_plugins`; safe to call more than once."""
    _speak_through_vllm()
    install("engine_plugins.admin.runtime_dir", "ensure_runtime_dir")
    if "vllm.engine.arg_utils" in sys.modules:
        install("vllm_ext.engine_arguments", "hook_engine_arguments")
    if "vllm.v1.engine.core" in sys.modules:
        install("vllm_ext.core_hooks", "hook_engine_core")
        install("vllm_ext.core_hooks", "hook_gate", needed=False)
    if "vllm.v1.worker.worker_base" in sys.modules:
        install("vllm_ext.memory_baseline", "hook_load_model")
    if "vllm.entrypoints.launchers.app" in sys.modules:
        install("vllm_ext.admin_mount", "hook_app")
        install("vllm_ext.admission_hook", "hook_admission")


def _speak_through_vllm() -> None:
    """Hang our loggers below vLLM's, whose level and handlers are set later than this."""
    for name in ("engine_plugins", "vllm_ext"):
        logging.getLogger(name).parent = logging.getLogger("vllm")
