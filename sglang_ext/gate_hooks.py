"""The prefill gate's hooks in a scheduler: put in with the gate, at its start or while it serves.

All are methods that SGLang looks up anew for each step. Its event loop is not, which runs for as
long as the server: `sglang_ext.lost_step.run_loop` is around it from the start.
"""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine_plugins.engine_release import GATE
from sglang_ext import prefill_gate, prefill_hook, step_hook
from sglang_ext.hooks import install, installed

__all__ = ["apply_gate_hooks", "hook_gate"]

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def hook_gate() -> None:
    """Register the hooks, once."""
    if f"{_SCHEDULER}.run_batch" in installed():
        return
    install(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        HookType.AROUND,
        prefill_hook.get_new_batch_prefill,
        part=GATE,
    )
    install(
        f"{_SCHEDULER}._add_request_to_queue",
        HookType.BEFORE,
        prefill_hook.before_queueing,
        part=GATE,
    )
    install(f"{_SCHEDULER}.run_batch", HookType.AROUND, step_hook.run_batch, part=GATE)
    install(
        "sglang.srt.managers.scheduler_components.request_receiver"
        ".SchedulerRequestReceiver._pull_raw_reqs",
        HookType.AFTER,
        prefill_gate.after_pull,
        part=GATE,
    )


def apply_gate_hooks() -> None:
    """Put them into the scheduler that runs in this process, between two of its steps."""
    hook_gate()
    HookRegistry.apply_hooks()
