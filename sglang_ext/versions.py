"""The SGLang releases that this package was probed on, and what it relies on in them."""

from __future__ import annotations

import sglang

from engine_plugins.engine_release import EngineRelease

__all__ = ["SGLANG"]

SGLANG = EngineRelease(
    engine="SGLang",
    version=sglang.__version__,
    probed=("0.5.23",),
    hooks={
        "sglang.srt.plugins.hook_registry": ("HookRegistry._patched",),
        "sglang.srt.server_args": ("prepare_server_args",),
        "sglang.srt.entrypoints.http_server": ("_setup_and_run_http_server", "app"),
        "sglang.srt.utils.torch_memory_saver_adapter": (
            "_TorchMemorySaverAdapterReal.configure_subprocess",
        ),
        "sglang.srt.utils.auth": ("add_api_key_middleware", "AuthLevel.ADMIN_FORCE"),
        "sglang.srt.managers.io_struct": ("hook_custom_types", "BaseReq"),
        "sglang.srt.managers.tokenizer_manager": (
            "TokenizerManager.init_communicators",
            "TokenizerManager.generate_request",
            "TokenizerManager._send_one_request",
            "TokenizerManager._send_batch_request",
            "TokenizerManager._handle_abort_finish_reason",
            "TokenizerManager.pause_generation",
            "TokenizerManager.continue_generation",
            "TokenizerManager.abort_request",
            "TokenizerManager.update_weight_version",
        ),
        "sglang.srt.managers.scheduler": (
            "Scheduler.init_request_dispatcher",
            "Scheduler.handle_generate_request",
            "Scheduler.pause_generation",
            "Scheduler.continue_generation",
            "Scheduler.flush_cache",
            "Scheduler.abort_request",
            "Scheduler.collect_inflight_reqs",
            "Scheduler.event_loop_normal",
            "Scheduler.event_loop_overlap",
            "Scheduler.process_batch_result",
            "Scheduler.run_batch",
            "Scheduler._get_new_batch_prefill_raw",
            "Scheduler._release_aborted_request",
            "Scheduler.send_abort_output",
            "Scheduler.process_pending_chunked_abort",
            "Scheduler.get_num_allocatable_reqs",
        ),
        "sglang.srt.managers.scheduler_components.request_receiver": (
            "SchedulerRequestReceiver._pull_raw_reqs",
        ),
        "sglang.srt.managers.schedule_batch": ("FINISH_ABORT", "Req.init_next_round_input"),
        "sglang.srt.managers.schedule_policy": ("SchedulePolicy.calc_priority",),
        "sglang.srt.mem_cache.common": ("release_kv_cache",),
        "sglang.srt.disaggregation.utils": ("prepare_abort",),
        "sglang.srt.managers.scheduler_components.weight_updater": (
            "SchedulerWeightUpdaterManager",
            "_WeightUpdateSession",
        ),
        "sglang.srt.model_executor.model_runner_components.weight_updater": (
            "WeightUpdater.begin_weight_update",
            "WeightUpdater.end_weight_update",
        ),
        "sglang.srt.model_executor.model_runner": ("ModelRunner.load_model",),
        "sglang.srt.model_loader.loader": ("_initialize_model", "_get_quantization_config"),
        "sglang.srt.layers.rotary_embedding.factory": ("_ROPE_DICT",),
    },
)
