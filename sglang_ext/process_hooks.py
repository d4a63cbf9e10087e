"""Which hooks belong to which process of an SGLang server that asked for us."""

from __future__ import annotations

import logging
from importlib import import_module

from sglang.srt.plugins.hook_registry import HookType

from engine_plugins.admin.runtime_dir import hold_runtime_dir
from engine_plugins.engine_release import GATE, gate_refusal
from engine_plugins.settings import Settings
from sglang_ext.hooks import install

__all__ = ["hook_api_process", "hook_first_process", "hook_scheduler"]

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def hook_first_process() -> None:
    """Where an engine is started and the first API process serves."""
    from sglang_ext import admin_mount, launch, memory_saver, server_flags

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
        "sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes",
        HookType.AROUND,
        launch.launch_schedulers,
    )
    install(
        "sglang.srt.entrypoints.engine.Engine._launch_detokenizer_subprocesses",
        HookType.AROUND,
        launch.launch_detokenizers,
    )
    install(
        "sglang.srt.utils.common.kill_process_tree",
        HookType.BEFORE,
        launch.before_kill,
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
    hook_api_process()


def hook_api_process() -> None:
    """Where requests come in."""
    logging.getLogger("sglang_ext").setLevel(logging.INFO)
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


def hook_scheduler() -> None:
    """Where a rank computes; of the gate no more than what cannot be put in later."""
    from sglang_ext import (
        core_hooks,
        lost_step,
        memory_baseline,
        memory_saver,
        scheduler_extension,
    )

    logging.getLogger("sglang_ext").setLevel(logging.INFO)
    hold_runtime_dir()
    if gate_refusal() is None:
        for loop in ("event_loop_normal", "event_loop_overlap"):
            install(f"{_SCHEDULER}.{loop}", HookType.AROUND, lost_step.run_loop, part=GATE)
        if Settings.load().prefill_gate != "off":
            import_module("sglang_ext.gate_hooks").hook_gate()
    install(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        HookType.BEFORE,
        memory_baseline.before_load_model,
    )

    install(
        f"{_SCHEDULER}.init_request_dispatcher",
        HookType.AFTER,
        scheduler_extension.attach_to_scheduler,
    )
    install(
        f"{_SCHEDULER}.handle_generate_request",
        HookType.BEFORE,
        core_hooks.mark_new_request,
    )
    for name in ("handle_generate_request", "handle_embedding_request"):
        install(f"{_SCHEDULER}.{name}", HookType.AFTER, core_hooks.end_if_fenced)
    memory_saver.take_hook_mode()
