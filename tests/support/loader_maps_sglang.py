"""SGLang's ranks, played in this process; see `loader_maps`."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt import runtime_context
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.dp_attention import init_dp_gathered_buffer, initialize_dp_attention
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.model_loader.loader import _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.server_args import ServerArgs
from torch import nn

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.loader_trace import LoaderTrace
from sglang_ext.weight_installer import SglangWeightInstaller

__all__ = ["engine"]

_ONE_OF_EACH = ("world_group", "pp_group", "moe_dp_group", "attn_cp_group")
_LENT = ("model.embed_tokens.weight", "lm_head.weight")
"""Parameters of a draft model that SGLang replaces by the target's, if it has none of its own."""
_OF_SOME = ("tp", "attn_tp", "moe_ep", "moe_tp")


@contextmanager
def engine() -> Iterator[SglangHere]:
    """Groups of one process, whose size and rank each played rank overstates."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        with _context(_arguments(Path(folder)), 0):
            parallel_state.init_distributed_environment(
                world_size=1,
                rank=0,
                distributed_init_method=f"file://{folder}/rendezvous",
                local_rank=0,
                backend="gloo",
            )
            parallel_state.initialize_model_parallel()
            parallel = runtime_context.get_parallel()
            names = (*_ONE_OF_EACH, *(f"{name}_group" for name in _OF_SOME))
            try:
                yield SglangHere({name: getattr(parallel, name) for name in names})
            finally:
                parallel_state.destroy_model_parallel()
                parallel_state.destroy_distributed_environment()


@dataclass(frozen=True)
class SglangHere:
    """The `PlayedEngine` of SGLang."""

    groups: Mapping[str, Any]
    kind = "sglang"

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
    ) -> Iterator[SglangRank]:
        """One rank; `arguments` are further ones of SGLang's `ServerArgs`."""
        server = _arguments(
            model,
            tp_size=tp_size,
            ep_size=tp_size if expert_parallel else 1,
            json_model_override_args=json.dumps(_overrides(model)),
            **_speculation(model, draft),
            dtype=dtype,
            **arguments,
        )
        with _context(server, tp_rank) as parallel:
            parallel.override_permanently(**self._placed(parallel))
            initialize_moe_config()
            initialize_dp_attention(server)
            config = ModelConfig.from_server_args(
                server, model_path=str(draft or model), is_draft_model=draft is not None
            )
            init_dp_gathered_buffer(config)
            yield SglangRank(config, is_draft=draft is not None)

    def _placed(self, parallel: Any) -> dict[str, Any]:
        """Have the groups of one process say that it is a rank of several."""
        groups = dict(self.groups)
        for name in _OF_SOME:
            group = copy.copy(groups[f"{name}_group"])
            group.world_size = getattr(parallel, f"{name}_size")
            group.rank_in_group = getattr(parallel, f"{name}_rank")
            groups[f"{name}_group"] = group
        return {**groups, "shared_experts_tp_group": groups["tp_group"]}


@dataclass(frozen=True)
class SglangRank:
    """The `PlayedRank` of SGLang, of the served model or of the one that drafts for it."""

    config: ModelConfig
    is_draft: bool = False

    @property
    def rules(self) -> SglangWeightInstaller:
        runner = SimpleNamespace(
            model=None,
            model_config=self.config,
            load_config=LoadConfig(load_format="dummy"),
            device="cpu",
        )
        worker = SimpleNamespace(model_runner=runner)
        return SglangWeightInstaller(
            SimpleNamespace(weight_updater=None, tp_worker=worker, draft_worker=None)
        )

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        trace = self.rules.trace(tensors)
        if not self.is_draft:
            return trace
        filled = {copy.parameter for copy in trace.copies if copy.sources}
        numel = trace.parameter_numel.items()
        own = {name: n for name, n in numel if name in filled or name not in _LENT}
        return replace(trace, parameter_numel=own)

    def model(self) -> nn.Module:
        with set_default_torch_dtype(self.config.dtype), torch.device("cpu"):
            return _initialize_model(self.config, LoadConfig(load_format="dummy"))

    def installer(self, model: nn.Module) -> SglangWeightInstaller:
        installer = self.rules
        installer._runner.model = model
        installer._runner.weight_updater = _updater(self.config, model)
        return installer


def _updater(config: ModelConfig, model: nn.Module) -> WeightUpdater:
    """SGLang's own, which asks a whole model runner only for what an update here does not need."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("update_model_fields", "recapture_cuda_graph", "get_model_runner")
    )
    return WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=config,
        custom_weight_loaders={},
        get_model=lambda: model,
        **nothing,
    )


def _arguments(model: Path, *, dtype: str = "float32", **more: Any) -> ServerArgs:
    settings: dict[str, Any] = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "max_total_tokens": 128,
    }
    return ServerArgs(model_path=str(model), dtype=dtype, **{**settings, **more})


def _speculation(model: Path, draft: Path | None) -> dict[str, Any]:
    if draft is None:
        return {}
    return {
        "speculative_algorithm": "EAGLE" if draft == model else "EAGLE3",
        "speculative_draft_model_path": str(draft),
        "speculative_num_steps": 1,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 2,
    }


def _overrides(model: Path) -> dict[str, Any]:
    """What SGLang reads of DeepSeek's published configs, and transformers does not write.

    On the CPU it has MLA's rotary embedding in its scaled form only. None of it shapes a parameter.
    """
    config = json.loads((model / "config.json").read_text())
    published = {
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "rope_scaling": {"rope_type": "yarn", "factor": 1.0},
    }
    if "kv_lora_rank" not in config:
        return {}
    return {key: value for key, value in published.items() if config.get(key) is None}


@contextmanager
def _context(server: ServerArgs, rank: int) -> Iterator[Any]:
    """SGLang's process-wide configuration, for as long as the context lasts."""
    ranks = runtime_context.SpawnRanks(world_rank=rank, gpu_id=0)
    context = runtime_context.create_context(server, role="scheduler", ranks=ranks)
    with runtime_context.use_context(context):
        yield context.parallel
