"""The SGLang releases that this package was run on, and every name that it relies on in them."""

from __future__ import annotations

import sglang

from engine_plugins.engine_release import GATE, UPDATES, EngineNames, EngineRelease

__all__ = ["SGLANG"]

_UPDATES = EngineNames(
    hooked={
        "sglang.srt.server_args": ("prepare_server_args(argv)",),
        "sglang.srt.entrypoints.http_server": (
            "_setup_and_run_http_server(server_args, tokenizer_manager, *args, **kwargs)",
        ),
        "sglang.srt.entrypoints.engine": (
            "Engine._launch_detokenizer_subprocesses(cls, *args, **kwargs)",
            "Engine._launch_scheduler_processes(cls, server_args, *args, **kwargs)",
        ),
        "sglang.srt.utils.auth": ("add_api_key_middleware(app, **keys)",),
        "sglang.srt.utils.common": (
            "kill_process_tree(parent_pid, include_parent=..., *args, **kwargs)",
        ),
        "sglang.srt.utils.torch_memory_saver_adapter": (
            "_TorchMemorySaverAdapterReal.configure_subprocess(self)",
        ),
        "sglang.srt.entrypoints.openai.serving_responses": (
            "async OpenAIServingResponses._generate_with_builtin_tools(self, *args, **kwargs)",
        ),
        "sglang.srt.managers.tokenizer_manager": (
            "TokenizerManager.init_communicators(self)",
            "async TokenizerManager.generate_request(self, obj, request=..., *args, **kwargs)",
        ),
        "sglang.srt.managers.scheduler": (
            "Scheduler.init_request_dispatcher(self)",
            "Scheduler.handle_generate_request(self, recv_req, **kwargs)",
            "Scheduler.handle_embedding_request(self, recv_req, **kwargs)",
        ),
        "sglang.srt.model_executor.model_runner": (
            "ModelRunner.load_model(self, *args, **kwargs)",
        ),
    },
    used={
        "sglang.srt.plugins": ("load_plugins()",),
        "sglang.srt.plugins.hook_registry": (
            "HookRegistry: _patched",
            "HookRegistry.apply_hooks(cls)",
            "HookRegistry.register(cls, target, hook, hook_type)",
            "HookType: AFTER, AROUND, BEFORE",
        ),
        "sglang.srt.constants": ("HEALTH_CHECK_RID_PREFIX",),
        "sglang.srt.environ": (
            "envs",
            "Envs: SGLANG_GRPC_PORT, SGLANG_MEMORY_SAVER_CUDA_GRAPH, SGLANG_RUST_SERVER",
        ),
        "sglang.srt.managers.utils": ("is_health_check_generate_req(recv_req)",),
        "sglang.srt.utils": ("is_cpu()",),
        "sglang.srt.utils.auth": ("AuthLevel: ADMIN_FORCE, ADMIN_OPTIONAL", "auth_level(level)"),
        "sglang.utils": ("TypeBasedDispatcher.__iadd__(self, other)",),
        # `ServerArgs` is put together from these.
        "sglang.srt.arg_groups.fields.device": ("Device: device, use_ray",),
        "sglang.srt.arg_groups.fields.disagg": (
            "Disagg: disaggregation_mode, encoder_only, language_only",
        ),
        "sglang.srt.arg_groups.fields.exec_": (
            "ExecFeatures: enable_memory_saver, enable_weights_cpu_backup",
        ),
        "sglang.srt.arg_groups.fields.memory": (
            "Memory: enable_flexkv, enable_lmcache, radix_cache_backend",
        ),
        "sglang.srt.arg_groups.fields.mm": ("Mm: enable_mm_global_cache",),
        "sglang.srt.arg_groups.fields.model": (
            "Model: checkpoint_engine_wait_weights_before_ready, load_format",
        ),
        "sglang.srt.arg_groups.fields.parallel": (
            "Parallel: attn_dp_size, dp_size, nnodes, pp_size, tp_size",
        ),
        "sglang.srt.arg_groups.fields.serving": (
            "Serving: grpc_mode, grpc_port, smg_grpc_mode, tokenizer_worker_num",
        ),
        "sglang.srt.entrypoints.http_server": (
            "app",
            "get_global_state()",
            "async health_generate(request)",
            "_GlobalState: tokenizer_manager",
        ),
        "sglang.srt.managers.io_struct": (
            "BaseReq",
            "hook_custom_types(*types)",
            "AbortReq: abort_all, finished_reason, rid",
            "ContinueGenerationReqInput: torch_empty_cache",
            "PauseGenerationReqInput: mode",
            "UpdateWeightVersionReqInput: abort_all_requests, new_version",
            "GenerateReqInput: batch_size, parallel_sample_num, rid, stream",
            "GenerateReqInput.normalize_batch_and_arguments(self)",
            "TokenizedGenerateReqInput: extra_key, input_ids, rid",
        ),
        "sglang.srt.managers.mm_schedule": ("embedding_cache",),
        "sglang.srt.managers.tokenizer_manager": (
            "TokenizerManager: _result_dispatcher, is_pause, is_pause_cond, mm_processor, "
            "model_config, model_update_lock, rid_to_state, served_model_name, server_args",
            "TokenizerManager._dispatch_to_scheduler(self, obj)",
            "TokenizerManager._handle_abort_req(self, recv_obj)",
            "TokenizerManager._update_weight_version_if_provided(self, weight_version)",
            "TokenizerManager.abort_request(self, *, abort_all)",
            "TokenizerManager.auto_create_handle_loop(self)",
            "async TokenizerManager.continue_generation(self, obj)",
            "async TokenizerManager.pause_generation(self, obj)",
            "async TokenizerManager.update_weight_version(self, obj)",
        ),
        "sglang.srt.managers.scheduler": (
            "Scheduler: _engine_paused, _request_dispatcher, draft_worker, grammar_manager, "
            "memory_saver_adapter, server_args, tp_cpu_group, tp_worker, waiting_queue, "
            "weight_updater",
            "Scheduler.abort_request(self, recv_req)",
            "Scheduler.collect_inflight_reqs(self)",
            "Scheduler.continue_generation(self, recv_req)",
            "Scheduler.flush_cache(self, *, empty_cache)",
            "Scheduler.pause_generation(self, recv_req)",
        ),
        "sglang.srt.constrained.grammar_manager": ("GrammarManager: grammar_queue",),
        "sglang.srt.utils.aio_rwlock": ("async RWLock.is_locked(self)",),
        "sglang.srt.multimodal.processors.base_processor": (
            "BaseMultimodalProcessor.clear_preprocess_cache(self)",
        ),
        "sglang.srt.managers.schedule_batch": (
            "FINISH_ABORT.__init__(self, message, status_code, err_type)",
            "FINISH_ABORT.to_json(self)",
            "ReqKvInfo: holds_kv",
            "Req: extra_key, kv, rid",
            "Req.finished(self)",
        ),
        "sglang.srt.model_executor.model_runner_components.weight_updater": (
            "WeightUpdater.begin_weight_update(self)",
            "WeightUpdater.end_weight_update(self, *, run_post_load)",
            "_unsupported_derived_weight_cache_error(model)",
        ),
        "sglang.srt.managers.tp_worker": ("TpModelWorker: model_runner",),
        "sglang.srt.model_executor.model_runner": (
            "ModelRunner: device, gpu_id, load_config, model, model_config, token_to_kv_pool, "
            "weight_updater",
        ),
        "sglang.srt.configs.model_config": (
            "ModelConfig: dtype, hf_config, hf_text_config, model_path, revision",
        ),
        "sglang.srt.model_loader.loader": (
            "_get_quantization_config(model_config, load_config)",
            "_initialize_model(model_config, load_config, quant_config)",
        ),
        "sglang.srt.model_loader.utils": (
            "get_model_architecture(model_config)",
            "set_default_torch_dtype(dtype)",
        ),
        "sglang.srt.models.transformers": ("TransformersBase", "_TRANSFORMERS_MOE_LAYERS"),
        "sglang.srt.layers.rotary_embedding.factory": ("_ROPE_DICT",),
        "sglang.srt.lora.layers": ("BaseLayerWithLoRA",),
    },
)

_GATE = EngineNames(
    hooked={
        "sglang.srt.managers.tokenizer_manager": (
            "async TokenizerManager._handle_abort_finish_reason(self, out, *args, **kwargs)",
            "async TokenizerManager._send_batch_request(self, tokenized_objs, *args, **kwargs)",
            "async TokenizerManager._send_one_request(self, tokenized_obj, *args, **kwargs)",
        ),
        "sglang.srt.managers.scheduler": (
            "Scheduler._add_request_to_queue(self, req, *args, **kwargs)",
            "Scheduler._get_new_batch_prefill_raw(self, *, running_batch, **rest)",
            "Scheduler.event_loop_normal(self)",
            "Scheduler.event_loop_overlap(self)",
            "Scheduler.run_batch(self, batch, *args, **kwargs)",
        ),
        "sglang.srt.managers.scheduler_components.request_receiver": (
            "SchedulerRequestReceiver._pull_raw_reqs(self)",
        ),
    },
    used={
        "sglang.srt.environ": ("Envs: SGLANG_ENABLE_LOGPROB_CHUNK, SGLANG_LOGPROB_CHUNK_SIZE",),
        "sglang.srt.arg_groups.fields.exec_": ("ExecKernel: attention_backend",),
        "sglang.srt.arg_groups.fields.lora": ("Lora: max_lora_rank",),
        "sglang.srt.arg_groups.fields.model": ("Model: model_path",),
        "sglang.srt.configs.model_config": ("ModelConfig: context_len",),
        "sglang.srt.disaggregation.utils": ("prepare_abort(req, error_message, status_code)",),
        "sglang.srt.mem_cache.common": ("release_kv_cache(req, tree_cache, *, checkpoint)",),
        "sglang.srt.managers.io_struct": (
            "TokenizedGenerateReqInput: input_ids, logprob_start_len, return_logprob, stream",
        ),
        "sglang.srt.managers.schedule_policy": (
            "CacheAgnosticPolicy: FCFS",
            "SchedulePolicy: policy",
            "SchedulePolicy.calc_priority(self, waiting_queue, running_batch, *, processed_tokens)",
        ),
        "sglang.srt.managers.schedule_batch": (
            "Req: beam_group, discard_output_reason, full_untruncated_fill_ids, logprob, "
            "logprob_start_len, lora_id, multimodal_inputs, origin_input_ids, output_ids, "
            "prefix_len, return_logprob, rid, stream, to_finish",
            "Req.init_next_round_input(self, tree_cache)",
            "Req.refresh_fill_ids(self)",
            "ScheduleBatch: batch_is_full, extend_lens, forward_mode, prefix_lens, reqs",
        ),
        "sglang.srt.model_executor.model_runner": ("ModelRunner: server_args",),
        "sglang.srt.constrained.grammar_manager": (
            "GrammarManager.get_ready_grammar_requests(self)",
            "GrammarManager.has_waiting_grammars(self)",
        ),
        "sglang.srt.beam_search.coordinator": ("BeamCoordinator.retire_group(self, req)",),
        "sglang.srt.mem_cache.base_prefix_cache": ("BasePrefixCache.supports_mamba(self)",),
        "sglang.srt.speculative.spec_info": ("SpeculativeAlgorithm.is_none(self)",),
        "sglang.srt.managers.scheduler": (
            "Scheduler: _pending_chunked_abort_req, beam_coordinator, chunked_prefill_size, "
            "chunked_req, cur_batch_for_debug, enable_priority_preemption, "
            "enable_priority_scheduling, is_hybrid_swa, is_mixed_chunk, last_batch, "
            "max_prefill_tokens, max_running_requests, max_total_num_tokens, model_config, "
            "page_size, policy, processed_tokens_counter, result_queue, running_batch, "
            "spec_algorithm, tree_cache, truncation_align_size",
            "Scheduler._release_aborted_request(self, req)",
            "Scheduler.get_num_allocatable_reqs(self, running_bs, *, running_batch)",
            "Scheduler.process_batch_result(self, batch, result)",
            "Scheduler.process_pending_chunked_abort(self)",
            "Scheduler.send_abort_output(self, abort_req, req)",
        ),
    },
)

SGLANG = EngineRelease(
    engine="SGLang",
    package="sglang",
    version=sglang.__version__,
    probed=("0.5.23",),
    names={UPDATES: _UPDATES, GATE: _GATE},
)
