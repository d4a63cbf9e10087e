"""vLLM's ranks, played in this process; see `loader_maps`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import ModelRegistry

from engine_plugins.weights.loader_trace import LoaderTrace, LogicalTensor
from vllm_ext.weight_installer import VllmWeightInstaller

__all__ = ["engine"]


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
        **arguments: Any,
    ) -> Iterator[VllmRank]:
        """One rank; `arguments` are further ones of vLLM's `EngineArgs`."""
        for architecture in json.loads((model / "config.json").read_text())["architectures"]:
            _look_at_class_here(architecture)
        config = EngineArgs(
            model=str(model),
            tensor_parallel_size=tp_size,
            enable_expert_parallel=expert_parallel,
            dtype="float32",
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=64,
            kv_cache_memory_bytes=1 << 20,
            **arguments,
        ).create_engine_config()
        with _place(tp_size, tp_rank), set_current_vllm_config(config):
            yield VllmRank(config)


@dataclass(frozen=True)
class VllmRank:
    """The `PlayedRank` of vLLM."""

    config: VllmConfig

    @property
    def rules(self) -> VllmWeightInstaller:
        return VllmWeightInstaller(self.config, nn.Linear(1, 1))  # no live model is asked for

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        return self.rules.trace(tensors)

    def model(self) -> nn.Module:
        return initialize_model(self.config)


def _look_at_class_here(architecture: str) -> None:
    """Spare vLLM the process in which it would look at the class: that takes longer than tests."""
    known = ModelRegistry.models.get(architecture)
    if known is not None:
        ModelRegistry.register_model(architecture, known.load_model_cls())


@contextmanager
def _place(tp_size: int, tp_rank: int) -> Iterator[None]:
    """Have the groups of one process say that it is a rank of several."""
    groups = (parallel_state._TP, parallel_state._ETP, parallel_state._EP)
    with pytest.MonkeyPatch.context() as patch:
        for group in groups:
            patch.setattr(group, "world_size", tp_size)
            patch.setattr(group, "rank_in_group", tp_rank)
        yield
