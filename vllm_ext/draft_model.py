"""The model that drafts tokens for a served one (EAGLE, MTP), updated together with it.

It may use the target's embedding and head; those belong to the target. What is its own has names
under `draft.`, and is traced and loaded by the draft model's own loader.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.engine_tensors import ModelParameters
from engine_plugins.weights.loader.joined_traces import DRAFT, with_draft
from engine_plugins.weights.loader.loader_trace import LoaderTrace, trace_loader
from vllm_ext.loader_model import loader_model

__all__ = ["DraftModel", "draft_of"]


class DraftModel:
    """The draft model of one vLLM worker.

    A draft that comes with the target's checkpoint (MTP) takes the tensors of that checkpoint; one
    with a checkpoint of its own takes the tensors that are published under `draft.`.

    Attributes:
        model: the live one.
        config: its part of vLLM's configuration.
        modules: those that it does not share with the target, by names under `draft.`.
    """

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, target: nn.Module) -> None:
        self.model = model
        self.config: ModelConfig = vllm_config.speculative_config.draft_model_config
        served = set(target.modules())
        self.modules = {
            (DRAFT + name).rstrip("."): module
            for name, module in model.named_modules()
            if module not in served
        }
        self._vllm_config = vllm_config
        self._with_target = self.config.model == vllm_config.model_config.model
        self._takes: frozenset[str] = frozenset()

    def parameters(self) -> dict[str, torch.Tensor]:
        """The live parameters and buffers that are its own, by names under `draft.`."""
        held = (*self.model.named_buffers(), *self.model.named_parameters())
        named = {DRAFT + name: each for name, each in held}
        return {name: each for name, each in named.items() if self._is_own(name)}

    def join(self, target: LoaderTrace, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        """The target's trace, and what the draft model's loader does with `tensors`.

        Raises:
            UnsupportedError: none of them is for the draft model, which would stay behind.
            WeightMismatchError: the loader refused a tensor.
        """
        meant = [each for each in tensors if self._with_target or each.name.startswith(DRAFT)]
        with loader_model(self._vllm_config, self.config) as model:
            trace = trace_loader(
                ModelParameters(model), lambda weights: _load(model, weights), meant
            )
        own = {name for name in trace.parameter_numel if self._is_own(DRAFT + name)}
        joined = with_draft(target, trace, own)
        self._takes = frozenset(
            name for c in joined.copies[len(target.copies) :] for name in c.sources
        )
        if not self._takes:
            raise UnsupportedError(
                "this engine drafts tokens with a model of its own, and nothing is offered for it",
                remedy="offer the checkpoint's prediction layers, or the draft model's tensors as "
                f"{DRAFT}<name>; or serve without speculative decoding",
            )
        return joined

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand the model's own loader what fills parameters of its own."""
        _load(self.model, ((name, each) for name, each in tensors if name in self._takes))

    def _is_own(self, parameter: str) -> bool:
        return parameter.rpartition(".")[0] in self.modules


def draft_of(model_runner: Any, vllm_config: VllmConfig) -> DraftModel | None:
    """The draft model of a worker, if it drafts with one."""
    model = getattr(getattr(model_runner, "drafter", None), "model", None)
    if not isinstance(model, nn.Module):
        return None
    return DraftModel(vllm_config, model, model_runner.get_model())


def _load(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    load_weights = cast(Any, model).load_weights
    load_weights((name.removeprefix(DRAFT), tensor) for name, tensor in tensors)
