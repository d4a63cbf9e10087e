"""The vLLM releases that this package was run on, and every name that it relies on in them."""

from __future__ import annotations

import vllm

from engine_plugins.engine_release import GATE, UPDATES, EngineNames, EngineRelease

__all__ = ["VLLM"]

_UPDATES = EngineNames(
    hooked={
        "vllm.engine.arg_utils": ("EngineArgs.create_engine_config(self, *args, **kwargs)",),
        "vllm.entrypoints.launchers.app": ("attach_endpoint_plugins(app, *args, **kwargs)",),
        "vllm.v1.engine.async_llm": (
            "AsyncLLM.check_admission(self, *args, **kwargs)",
            "async AsyncLLM.generate(self, prompt, sampling_params, *args, **kwargs)",
        ),
        "vllm.entrypoints.openai.responses.serving": (
            "async OpenAIServingResponses._generate_with_builtin_tools"
            "(self, request_id, engine_input, sampling_params, *args, **kwargs)",
        ),
        "vllm.v1.engine.core": (
            "EngineCore._initialize_effective_attention_block_size(self, *args, **kwargs)",
            "EngineCore.preprocess_add_request(self, request, *args, **kwargs)",
        ),
        "vllm.v1.worker.gpu_worker": ("Worker.load_model(self, *args, **kwargs)",),
    },
    used={
        "vllm.engine.arg_utils": (
            "EngineArgs: _api_process_count, _api_process_rank, additional_config, "
            "enable_sleep_mode, worker_extension_cls",
        ),
        "vllm.engine.protocol": ("EngineClient",),
        "vllm.envs": ("VLLM_USE_RUST_FRONTEND",),
        "vllm.platforms": ("current_platform",),
        "vllm.platforms.interface": ("Platform.is_cpu(self)",),
        "vllm.utils.import_utils": ("resolve_obj_by_qualname(qualname)",),
        "vllm.utils.torch_utils": ("set_default_torch_dtype(dtype)",),
        "vllm.exceptions": (
            "GracefulHTTPError.__init__(self, message, http_status)",
            "RetryableRequestError",
        ),
        "vllm.entrypoints.serve.exception_handling.error_response": (
            "create_error_response(message)",
        ),
        "vllm.sampling_params": ("SamplingParams: extra_args, n, prompt_logprobs",),
        "vllm.outputs": (
            "RequestOutput: outputs",
            "CompletionOutput: index, token_ids, finish_reason, stop_reason",
        ),
        "vllm.v1.engine.async_llm": (
            "AsyncLLM: engine_core, errored, output_processor, vllm_config",
            "async AsyncLLM.abort(self, request_id, internal)",
            "async AsyncLLM.pause_generation(self, *, mode, clear_cache)",
            "async AsyncLLM.resume_generation(self)",
            "async AsyncLLM.reset_prefix_cache(self, *, reset_running_requests)",
            "async AsyncLLM.reset_mm_cache(self)",
            "async AsyncLLM.reset_encoder_cache(self)",
            "async AsyncLLM.update_weight_version(self, new_version)",
            "async AsyncLLM.collective_rpc(self, method, *, kwargs)",
        ),
        "vllm.v1.engine.output_processor": ("OutputProcessor: request_states",),
        "vllm.v1.engine.core_client": (
            "async AsyncMPClient.call_utility_async(self, method, *args)",
        ),
        "vllm.v1.engine": ("EngineCoreRequest: cache_salt", "FinishReason: ERROR"),
        "vllm.v1.engine.core": (
            "EngineCore: scheduler, vllm_config",
            "EngineCoreProc._handle_request_preproc_error(self, request)",
            "EngineCoreProc._send_finish_outputs_to_client"
            "(self, req_ids, client_index, finish_reason)",
        ),
        "vllm.v1.core.sched.scheduler": (
            "Scheduler: requests",
            "Scheduler.finish_requests(self, request_ids, finished_status)",
            "Scheduler.get_request_counts(self)",
        ),
        "vllm.v1.request": (
            "RequestStatus: FINISHED_ERROR",
            "Request: block_hashes, cache_salt, client_index, num_computed_tokens, request_id",
            "Request.is_finished(self)",
            "Request.update_block_hashes(self)",
        ),
        "vllm.v1.worker.gpu_worker": (
            "Worker: device, model_runner, rank, vllm_config",
            "Worker.get_draft_model(self)",
            "Worker.sleep(self, *, level)",
            "Worker.wake_up(self, tags)",
        ),
        "vllm.v1.worker.gpu_model_runner": (
            "GPUModelRunner: drafter, kv_caches",
            "GPUModelRunner.get_model(self)",
            "GPUModelRunner.reset_lora_state(self)",
        ),
        "vllm.config": (
            "VllmConfig: additional_config, compilation_config, ec_transfer_config, "
            "kv_transfer_config, load_config, model_config, parallel_config, quant_config, "
            "speculative_config",
            "ECTransferConfig: ec_connector",
            "KVTransferConfig: kv_connector",
            "LoadConfig: load_format",
            "ModelConfig: dtype, enable_sleep_mode, hf_config, hf_text_config, model, "
            "served_model_name, word_embeddings_untied_by_checkpoint",
            "ParallelConfig: data_parallel_size, enable_eplb, nnodes, pipeline_parallel_size, "
            "tensor_parallel_size, worker_extension_cls",
            "CompilationConfig: static_all_moe_layers, static_forward_context",
            "SpeculativeConfig: draft_model_config",
            "set_current_vllm_config(vllm_config)",
        ),
        "vllm.model_executor.model_loader.utils": (
            "initialize_model(vllm_config, *, model_config)",
        ),
        "vllm.lora.layers": ("FusedMoEWithLoRA",),
        "vllm.lora.layers.base": ("BaseLayerWithLoRA",),
        "vllm.model_executor.layers.rotary_embedding": ("_ROPE_DICT",),
        "vllm.model_executor.layers.attention": ("is_deferred_attention_layer(layer)",),
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method": (
            "UnquantizedFusedMoEMethod: moe_kernel",
        ),
        "vllm.model_executor.layers.linear": ("UnquantizedLinearMethod",),
        "vllm.model_executor.layers.quantization.base_config": ("QuantizeMethodBase",),
        "vllm.model_executor.layers.quantization.kv_cache": ("BaseKVCacheMethod",),
        "vllm.model_executor.layers.vocab_parallel_embedding": (
            "ParallelLMHead",
            "UnquantizedEmbeddingMethod",
            "VocabParallelEmbedding: quant_method",
        ),
        "vllm.model_executor.model_loader.weight_tying": (
            "_get_untied_lm_head(model)",
            "_UntiedLMHead.tie(self, model)",
        ),
        "vllm.model_executor.model_loader.reload.layerwise": (
            "LayerReloadingInfo",
            "initialize_layerwise_reload(model)",
            "finalize_layerwise_reload(*args)",
            "finalize_layerwise_processing(model, model_config)",
            "get_layer_params_buffers(layer)",
            "get_layer_size(layer)",
            "get_layer_tensors(layer)",
            "get_layerwise_info(layer)",
            "materialize_layer(layer, info)",
            "restore_layer_on_meta(layer, info)",
            "_get_original_loader(tensor)",
            "_layerwise_process(layer, info)",
            "_place_kernel_tensors(layer, info)",
        ),
        "vllm.model_executor.model_loader.reload.types": (
            "LayerReloadingInfo: kernel_non_persistent_buffers, kernel_tensors, load_numel, "
            "load_numel_total, loaded_weights, restore_metadata",
            "LayerReloadingInfo.can_load(self)",
            "LayerReloadingInfo.reset(self)",
        ),
    },
)

_GATE = EngineNames(
    hooked={
        "vllm.v1.core.sched.scheduler": (
            "Scheduler.add_request(self, request)",
            "Scheduler.schedule(self, *args, **kwargs)",
            "Scheduler.update_from_output(self, scheduler_output, model_runner_output)",
            "Scheduler._free_request(self, request, *args, **kwargs)",
            "Scheduler._handle_blocked_waiting_request(self, request)",
            "Scheduler._get_local_prefix_cache_hit(self, request)",
            "Scheduler._reserve_prefill_lookahead"
            "(self, request, num_computed_tokens, num_new_tokens)",
        ),
        "vllm.v1.worker.gpu_worker": (
            "Worker.execute_model(self, scheduler_output, *args, **kwargs)",
            "Worker.sample_tokens(self, grammar_output, *args, **kwargs)",
        ),
    },
    used={
        "vllm.platforms.interface": ("Platform: device_type",),
        "vllm.sampling_params": ("RequestOutputKind: FINAL_ONLY", "SamplingParams: output_kind"),
        "vllm.v1.engine.core": ("EngineCore: model_executor",),
        "vllm.v1.core.sched.scheduler": (
            "Scheduler: block_size, kv_cache_manager, kv_holding_waiting, max_model_len, "
            "max_num_running_reqs, max_num_scheduled_tokens, need_mamba_block_aligned_split, "
            "num_spec_tokens, running, scheduler_config, waiting",
        ),
        "vllm.v1.core.kv_cache_manager": (
            "KVCacheManager: block_pool",
            "KVCacheManager.evict_blocks(self, block_ids)",
        ),
        "vllm.v1.core.block_pool": ("BlockPool: blocks",),
        "vllm.v1.core.sched.output": (
            "SchedulerOutput: num_scheduled_tokens, scheduled_encoder_inputs, "
            "total_num_scheduled_tokens",
        ),
        "vllm.v1.outputs": (
            "KVConnectorOutput: invalid_block_ids",
            "ModelRunnerOutput: kv_connector_output, req_id_to_index, req_ids",
        ),
        "vllm.v1.engine": (
            "EngineCoreOutput: events, finish_reason, new_token_ids, request_id, stop_reason, "
            "trace_headers",
            "EngineCoreOutputs: outputs",
        ),
        "vllm.v1.request": (
            "RequestStatus: RUNNING",
            "Request: is_prefill_chunk, lora_request, mm_features, num_output_placeholders, "
            "num_output_tokens, num_tokens, resumable, sampling_params, status, trace_headers",
            "Request.take_events(self)",
        ),
        "vllm.multimodal.inputs": (
            "MultiModalFeatureSpec: mm_position",
            "PlaceholderRange: length, offset",
            "PlaceholderRange.get_num_embeds(self)",
        ),
        "vllm.v1.executor.uniproc_executor": ("UniProcExecutor.collective_rpc(self, method)",),
        "vllm.v1.executor.multiproc_executor": ("MultiprocExecutor.collective_rpc(self, method)",),
        "vllm.v1.worker.worker_base": ("WorkerWrapperBase: worker",),
        "vllm.v1.worker.gpu_model_runner": ("GPUModelRunner: execute_model_state",),
        "vllm.config": (
            "VllmConfig: attention_config, lora_config, scheduler_config, use_v2_model_runner",
            "AttentionConfig: backend",
            "LoRAConfig: max_lora_rank",
            "ModelConfig: enforce_eager, has_inner_state, max_model_len, runner_type",
            "ParallelConfig: world_size",
            "SchedulerConfig: async_scheduling, enable_chunked_prefill",
        ),
    },
)

VLLM = EngineRelease(
    engine="vLLM",
    package="vllm",
    version=vllm.__version__,
    probed=("0.32",),
    names={UPDATES: _UPDATES, GATE: _GATE},
)
