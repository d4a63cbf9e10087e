"""The general plugin: loaded by vLLM in every process, before anything is built.

The first process lays out the runtime directory; then each process gets the hooks that belong
to it.
"""

from __future__ import annotations

import logging
import sys

from engine_plugins.admin.runtime_dir import ensure_runtime_dir

__all__ = ["register"]


def register() -> None:
    """Entry point of group `vllm.general_plugins`; safe to call more than once."""
    _speak_through_vllm()
    ensure_runtime_dir()
    if "vllm.engine.arg_utils" in sys.modules:
        from vllm_ext.engine_arguments import hook_engine_arguments

        hook_engine_arguments()
    if "vllm.v1.engine.core" in sys.modules:
        from vllm_ext.core_hooks import hook_engine_core

        hook_engine_core()
    if "vllm.v1.worker.worker_base" in sys.modules:
        from vllm_ext.memory_baseline import hook_load_model
        from vllm_ext.step_hook import hook_steps

        hook_load_model()
        hook_steps()
    if "vllm.entrypoints.launchers.app" in sys.modules:
        from vllm_ext.admin_mount import hook_app
        from vllm_ext.admission_hook import hook_admission

        hook_app()
        hook_admission()


def _speak_through_vllm() -> None:
    """Hang our loggers below vLLM's, whose level and handlers are set later than this."""
    for name in ("engine_plugins", "vllm_ext"):
        logging.getLogger(name).parent = logging.getLogger("vllm")
