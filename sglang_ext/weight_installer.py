"""Installing weights in a live SGLang model through the model's own loader.

SGLang loads into the parameters that serve. Around a load the model runner undoes and redoes what
its kernels pack, by its begin and end. The scheduler's messages for them wait at a barrier of all
ranks, so one rank's failure would hang the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from sglang.srt.lora.layers import BaseLayerWithLoRA
from sglang.srt.model_executor.model_runner_components import weight_updater
from torch import nn

from engine_plugins.errors import UnsupportedError, WeightMismatchError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.coverage import left_out_by_design, prediction_layers
from engine_plugins.weights.loader.engine_tensors import ModelParameters, tensors_beside
from engine_plugins.weights.loader.loader_trace import LoaderTrace, LoadWeights, trace_loader
from engine_plugins.weights.loader.own_checkpoint import left_as_built, tensors_of_checkpoint
from engine_plugins.weights.loader.wrapped_layers import without_wrappers
from sglang_ext.loader_model import loader_model

__all__ = ["SglangWeightInstaller"]


class SglangWeightInstaller:
    """The `WeightInstaller` of one scheduler rank."""

    def __init__(self, scheduler: Any) -> None:
        self._runner = scheduler.tp_worker.model_runner
        self._has_draft = scheduler.draft_worker is not None
        self._landed = False

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype that the engine serves in."""
        dtype = self._runner.model_config.dtype
        if not isinstance(dtype, torch.dtype):
            raise WeightMismatchError(
                f"SGLang reports the model dtype {dtype!r}, not a torch dtype"
            )
        return dtype

    def may_go_unused(self, name: str) -> bool:
        """Names that SGLang's loaders leave out by design."""
        predicting = prediction_layers(self._runner.model_config.hf_text_config)
        return left_out_by_design(name, tied=self._is_tied(), predicting=predicting)

    def _is_tied(self) -> bool:
        config = self._runner.model_config.hf_text_config
        return bool(getattr(config, "tie_word_embeddings", False))

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        """Record the loader's copies on a second model without memory."""
        if self._has_draft:
            raise UnsupportedError(
                "this engine decodes speculatively, and the draft model's weights are not updated",
                remedy="serve without speculative decoding",
            )
        self._refuse_derived_caches()
        with loader_model(self._runner) as model:
            parameters = ModelParameters(model, _made_after_loading(model))
            traced = partial(self._traced, parameters, cast(LoadWeights, model.load_weights))
            config = self._runner.model_config
            return left_as_built(
                traced(tensors),
                lambda: tensors_of_checkpoint(config.model_path, config.revision),
                traced,
            )

    def _traced(
        self,
        parameters: ModelParameters,
        load_weights: LoadWeights,
        tensors: Sequence[LogicalTensor],
    ) -> LoaderTrace:
        # Some loaders refuse a tied model's head; layers that predict they pass over themselves.
        tied = self._is_tied()
        meant = [each for each in tensors if not left_out_by_design(each.name, tied=tied)]
        return trace_loader(parameters, load_weights, meant, may_load_whole=True)

    def _refuse_derived_caches(self) -> None:
        """SGLang's own routes ask this before they write; its loader does not."""
        ask = getattr(weight_updater, "_unsupported_derived_weight_cache_error", None)
        reason = None if ask is None else ask(self._runner.model)
        if reason is not None:
            raise UnsupportedError(f"SGLang cannot update this model while it serves: {reason}")

    def live_parameters(self) -> Mapping[str, torch.Tensor]:
        """The parameters and buffers that serve; SGLang loads into them."""
        model = self._runner.model
        with self._plain():
            return {**dict(model.named_buffers()), **dict(model.named_parameters())}

    def _plain(self) -> AbstractContextManager[None]:
        """The live model without the wrappers that SGLang puts around layers for LoRA.

        Its loaders pass over parameters that they do not find, which experts' are behind one.
        """
        return without_wrappers(self._runner.model, BaseLayerWithLoRA)

    def begin(self) -> None:
        """Undo what SGLang's kernels packed, with no step of the model under way.

        SGLang's own update routes are closed (`closed_routes`), so nobody else loads meanwhile.
        """
        if self._runner.device != "cpu":
            torch.get_device_module(self._runner.device).synchronize()
        with self._plain():
            self._runner.weight_updater.begin_weight_update()

    def install(self, modules: Sequence[str], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load the tensors of some modules; SGLang copies them and keeps no reference."""
        with torch.no_grad(), self._plain():
            self._runner.model.load_weights(iter(tensors))

    def landed(self, modules: Sequence[str]) -> None:
        """What a model derives from them is made anew at the end."""
        self._landed = self._landed or bool(modules)

    def finish(self) -> None:
        """Have packed forms of the new weights made anew.

        Fixups of a model's own belong to its `load_weights` and have run with the last module.
        Where modules did not come through it, they are run here.
        """
        try:
            with torch.no_grad(), self._plain():
                self._runner.weight_updater.end_weight_update(run_post_load=self._landed)
        finally:
            self._landed = False

    def abandon(self) -> None:
        """As `finish`, over whatever has been loaded; the engine is fenced."""
        self.finish()


def _made_after_loading(model: nn.Module) -> AbstractSet[str]:
    """Names of what the model's fixups derive, as they run; `finish` has them run again."""
    made: set[str] = set()
    fix_up = getattr(model, "post_load_weights", None)
    if fix_up is None:
        return made

    def noting(*args: Any, **kwargs: Any) -> Any:
        before = tensors_beside(model)
        answer = fix_up(*args, **kwargs)
        after = tensors_beside(model)
        made.update(name for name, each in after.items() if each is not before.get(name))
        return answer

    vars(model)["post_load_weights"] = noting
    return made
