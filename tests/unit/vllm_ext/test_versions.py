"""vLLM's description: all that we rely on is in it, and in the release that is installed."""

from __future__ import annotations

import pytest

from engine_plugins.engine_release import GATE, UPDATES
from engine_plugins.engine_sources import EngineSources
from tests.support.engine_names import EngineCode
from vllm_ext.versions import VLLM

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
REQUEST = "vllm.v1.request:Request"
WORKER = "vllm.v1.worker.gpu_worker:Worker"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
CLIENT = "vllm.v1.engine.async_llm:AsyncLLM"
CONFIG, MODEL = "vllm.config:VllmConfig", "vllm.config:ModelConfig"
PARALLEL = "vllm.config:ParallelConfig"
STEP = "vllm.v1.core.sched.output:SchedulerOutput"
SAMPLING = "vllm.sampling_params:SamplingParams"
EXECUTORS = (
    "vllm.v1.executor.uniproc_executor:UniProcExecutor "
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor"
)
COMPLETION = "vllm.outputs:CompletionOutput"

CODE = EngineCode(
    folder="vllm_ext",
    release=VLLM,
    objects={
        "*": {
            "scheduler": SCHEDULER,
            "self._scheduler": SCHEDULER,
            "scheduler.scheduler_config": "vllm.config:SchedulerConfig",
            "core": "vllm.v1.engine.core:EngineCore",
            "request": f"{REQUEST} vllm.v1.engine:EngineCoreRequest",
            "worker": WORKER,
            "self._worker": WORKER,
            "wrapper": "vllm.v1.worker.worker_base:WorkerWrapperBase",
            "runner": RUNNER,
            "model_runner": RUNNER,
            "worker.model_runner": RUNNER,
            "client": CLIENT,
            "self._client": CLIENT,
            "self._client.engine_core": "vllm.v1.engine.core_client:AsyncMPClient",
            "config": CONFIG,
            "vllm_config": CONFIG,
            "self._vllm_config": CONFIG,
            "worker.vllm_config": CONFIG,
            "client.vllm_config": CONFIG,
            "config.model_config": MODEL,
            "vllm_config.model_config": MODEL,
            "self._vllm_config.model_config": MODEL,
            "config.parallel_config": PARALLEL,
            "worker.vllm_config.parallel_config": PARALLEL,
            "self._vllm_config.parallel_config": PARALLEL,
            "config.scheduler_config": "vllm.config:SchedulerConfig",
            "compilation": "vllm.config:CompilationConfig",
            "scheduler_output": STEP,
            "params": SAMPLING,
            "sampling_params": SAMPLING,
            "current_platform": "vllm.platforms.interface:Platform",
            "info": "vllm.model_executor.model_loader.reload.types:LayerReloadingInfo",
        },
        "core_hooks.py": {
            "self": "vllm.v1.engine.core:EngineCore vllm.v1.engine.core:EngineCoreProc",
            "self.scheduler": SCHEDULER,
        },
        "draft_model.py": {
            "self.config": MODEL,
            "vllm_config.speculative_config": "vllm.config:SpeculativeConfig",
        },
        "engine_arguments.py": {"arguments": "vllm.engine.arg_utils:EngineArgs"},
        "asked.py": {"arguments": "vllm.engine.arg_utils:EngineArgs"},
        "held_stream.py": {
            "output": "vllm.outputs:RequestOutput",
            "each": COMPLETION,
            "ended[0]": COMPLETION,
            "marked": SAMPLING,
        },
        "lost_step.py": {
            "manager": "vllm.v1.core.kv_cache_manager:KVCacheManager",
            "manager.block_pool": "vllm.v1.core.block_pool:BlockPool",
        },
        "prefill_gate.py": {
            "executor": EXECUTORS,
            "model": MODEL,
            "parallel": PARALLEL,
            "config.attention_config": "vllm.config:AttentionConfig",
            "config.lora_config": "vllm.config:LoRAConfig",
        },
        "prefill_shapes.py": {
            "output": STEP,
            "feature": "vllm.multimodal.inputs:MultiModalFeatureSpec",
            "feature.mm_position": "vllm.multimodal.inputs:PlaceholderRange",
        },
        "scheduler_hook.py": {
            "each": REQUEST,
            "output": STEP,
            "model_runner_output": "vllm.v1.outputs:ModelRunnerOutput",
            "loaded": "vllm.v1.outputs:KVConnectorOutput",
        },
        "step_hook.py": {"step": STEP},
        "weight_installer.py": {
            "config": "",  # a model's own
            "method": "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
            ":UnquantizedFusedMoEMethod",
        },
        "worker_extension.py": {"self": WORKER},
    },
)
BOTH = (UPDATES, GATE)
PARTS = {
    "*": (UPDATES,),
    "core_hooks.py": BOTH,
    "lost_step.py": BOTH,
    "prefill_gate.py": BOTH,
    "prefill_shapes.py": BOTH,
    "scheduler_hook.py": BOTH,
    "step_hook.py": BOTH,
    "step_order.py": BOTH,
}


@pytest.mark.parametrize("part", BOTH)
def test_the_installed_release_has_it_all(part: str) -> None:
    """Every name with the signature that we need."""
    assert VLLM.differences(part, EngineSources.installed("vllm")) == []


def test_every_name_is_listed() -> None:
    """What only the gate's files rely on may be in its part alone."""
    assert CODE.unlisted(parts=PARTS) == []


def test_every_function_that_is_replaced_is_listed_as_hooked() -> None:
    """Its signature must then be ours, not only fit a call."""
    assert CODE.replaced() == VLLM.hooked
