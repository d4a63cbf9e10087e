"""The plugin of group `sglang.srt.plugins`: loaded by SGLang in every process of a server.

A server without a flag of ours is left alone. Otherwise its first process lays out the runtime
directory, and each process gets the hooks that belong to it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys

from sglang.srt.plugins.hook_registry import HookType

from engine_plugins.admin.runtime_dir import RUNTIME_DIR, ensure_runtime_dir
from engine_plugins.engine_release import GATE, gate_refusal
from sglang_ext import server_flags
from sglang_ext.hooks import install

__all__ = ["register"]


def register() -> None:
    """Entry point; SGLang calls it once in each process."""
    logging.getLogger("sglang_ext").setLevel(logging.INFO)
    if multiprocessing.parent_process() is None:
        if any(argument.startswith(server_flags.FLAG) for argument in sys.argv):
            ensure_runtime_dir()
            _hook_first_process()
    elif RUNTIME_DIR in os.environ:
        if "sglang_ext.http_app" in sys.modules:
            _hook_api_process()
        elif "sglang.srt.managers.scheduler" in sys.modules:
            _hook_scheduler()


def _hook_first_process() -> None:
    from sglang_ext import admin_mount, memory_saver

    install(
        "sglang.srt.utils.torch_memory_saver_adapter"
        "._TorchMemorySaverAdapterReal.configure_subprocess",
        HookType.AROUND,
        memory_saver.preload_where_wanted,
    )

    install(
        "sglang.srt.server_args.prepare_server_args",
        HookType.AROUND,
        server_flags.prepare_server_args,
    )
    install(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        HookType.BEFORE,
        admin_mount.before_http_server,
    )
    install(
        "sglang.srt.utils.auth.add_api_key_middleware",
        HookType.AFTER,
        admin_mount.after_key_check,
    )
    _hook_api_process()


def _hook_api_process() -> None:
    from sglang_ext import admission_hook, scheduler_calls

    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    install(f"{manager}._send_one_request", HookType.AROUND, admission_hook.send_one, part=GATE)
    install(f"{manager}._send_batch_request", HookType.AROUND, admission_hook.send_batch, part=GATE)
    install(
        f"{manager}._handle_abort_finish_reason",
        HookType.AROUND,
        admission_hook.abort_reason,
        part=GATE,
    )
    install(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses"
        "._generate_with_builtin_tools",
        HookType.AROUND,
        admission_hook.answer_turns,
    )

    install(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_communicators",
        HookType.AFTER,
        scheduler_calls.attach_to_tokenizer_manager,
    )
    install(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        HookType.AROUND,
        admission_hook.generate_request,
    )


def _hook_scheduler() -> None:
    from sglang_ext import (
        core_hooks,
        memory_baseline,
        memory_saver,
        scheduler_extension,
    )

    if gate_refusal() is None:
        _hook_gate()
    install(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        HookType.BEFORE,
        memory_baseline.before_load_model,
    )

    install(
        "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
        HookType.AFTER,
        scheduler_extension.attach_to_scheduler,
    )
    install(
        "sglang.srt.managers.scheduler.Scheduler.handle_generate_request",
        HookType.BEFORE,
        core_hooks.mark_new_request,
    )
    memory_saver.take_hook_mode()


def _hook_gate() -> None:
    from sglang_ext import prefill_gate, prefill_hook, step_hook

    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    install(
        f"{scheduler}._get_new_batch_prefill_raw",
        HookType.AROUND,
        prefill_hook.get_new_batch_prefill,
        part=GATE,
    )
    install(
        f"{scheduler}._add_request_to_queue",
        HookType.BEFORE,
        prefill_hook.before_queueing,
        part=GATE,
    )
    install(f"{scheduler}.run_batch", HookType.AROUND, step_hook.run_batch, part=GATE)
    for loop in ("event_loop_normal", "event_loop_overlap"):
        install(f"{scheduler}.{loop}", HookType.AROUND, step_hook.run_loop, part=GATE)
    install(
        "sglang.srt.managers.scheduler_components.request_receiver"
        ".SchedulerRequestReceiver._pull_raw_reqs",
        HookType.AFTER,
        prefill_gate.after_pull,
        part=GATE,
    )
