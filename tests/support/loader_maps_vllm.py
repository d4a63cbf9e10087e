"""vLLM's ranks, played in this process; see `loader_maps`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.loader_trace import LoaderTrace, LoadWeights, trace_loader
from tests.support.vllm_classes import look_at_class_here
from vllm_ext.loader_model import loader_model
from vllm_ext.weight_installer import VllmWeightInstaller

__all__ = ["engine"]

_DRAFT_CLASSES = ("Glm4MoeMTPModel", "DeepSeekMTPModel", "Eagle3LlamaForCausalLM")


@contextmanager
def engine() -> Iterator[VllmHere]:
    """Groups of one process, whose size and rank each played rank overstates."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "")  # our hooks are for servers
        with set_current_vllm_config(VllmConfig()):
            parallel_state.init_distributed_environment(
                1, 0, f"file://{folder}/rendezvous", 0, "gloo"
            )
            parallel_state.initialize_model_parallel()
        try:
            yield VllmHere()
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


class VllmHere:
    """The `PlayedEngine` of vLLM."""

    kind = "vllm"

    @contextmanager
    def rank(
        self,
        model: Path,
        *,
        tp_size: int,
        tp_rank: int,
        expert_parallel: bool = False,
        draft: Path | None = None,
        dtype: str = "float32",
        **arguments: Any,
    ) -> Iterator[VllmRank]:
        """One rank; `arguments` are further ones of vLLM's `EngineArgs`.

        Where the CPU has AMX vLLM would take its latent attention for that, which packs bfloat16
        alone and fails in float32: vLLM's own switch has it take the plain one on every CPU.
        """
        if dtype == "float32":
            arguments.setdefault("attention_backend", "CPU_MLA")
        for folder in {model, draft or model}:
            for architecture in json.loads((folder / "config.json").read_text())["architectures"]:
                look_at_class_here(architecture)
        for architecture in _DRAFT_CLASSES if draft else ():
            look_at_class_here(architecture)
        config = EngineArgs(
            model=str(model),
            tensor_parallel_size=tp_size,
            enable_expert_parallel=expert_parallel,
            dtype=dtype,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=64,
            kv_cache_memory_bytes=1 << 20,
            speculative_config=_speculation(model, draft),
            **arguments,
        ).create_engine_config()
        with _place(tp_size, tp_rank), set_current_vllm_config(config):
            speculative = config.speculative_config
            yield VllmRank(config, speculative.draft_model_config if draft else None)


@dataclass(frozen=True)
class VllmRank:
    """The `PlayedRank` of vLLM; `draft` is the draft model's configuration, if it is that one's."""

    config: VllmConfig
    draft: ModelConfig | None = None

    @property
    def rules(self) -> VllmWeightInstaller:
        # No live model is asked for; one on the CPU would be refused what its reload gets wrong.
        return VllmWeightInstaller(self.config, nn.Linear(1, 1, device="meta"))

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        if self.draft is None:
            return self.rules.trace(tensors)
        with loader_model(self.config, self.draft) as model:
            load_weights = cast(LoadWeights, model.load_weights)
            return trace_loader(dict(model.named_parameters()), load_weights, tensors)

    def model(self) -> nn.Module:
        return initialize_model(self.config, model_config=self.draft)

    def installer(self, model: nn.Module) -> VllmWeightInstaller:
        layerwise.record_metadata_for_reloading(model)
        process_weights_after_loading(model, self.config.model_config, torch.device("cpu"))
        return VllmWeightInstaller(self.config, model)


def _speculation(model: Path, draft: Path | None) -> dict[str, Any] | None:
    if draft is None:
        return None
    own = {"method": "mtp"} if draft == model else {"method": "eagle3", "model": str(draft)}
    return {**own, "num_speculative_tokens": 1}


@contextmanager
def _place(tp_size: int, tp_rank: int) -> Iterator[None]:
    """Have the groups of one process say that it is a rank of several."""
    groups = (parallel_state._TP, parallel_state._ETP, parallel_state._EP)
    with pytest.MonkeyPatch.context() as patch:
        for group in groups:
            patch.setattr(group, "world_size", tp_size)
            patch.setattr(group, "rank_in_group", tp_rank)
        yield
