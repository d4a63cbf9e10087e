"""Installing weights in a live vLLM model with the parts of vLLM's own layerwise reload.

One engine module at a time: the layer is materialised, loaded by the model's own loader,
processed into its kernel format and copied into the tensors that the running model already
holds. vLLM's reload materialises a layer after it was loaded, from what it saw of the layer's
weight loaders; here the layer has its memory first, so whatever way a loader takes, it writes to
it (docs/decisions.md, D54). What the official route gets wrong on CPU is put right here, one
function each (D8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import layerwise

from engine_plugins.errors import EngineCallError, UnsupportedError, WeightMismatchError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.hardware.peak_memory import return_free_memory
from engine_plugins.weights.loader.coverage import (
    is_kv_scale,
    left_out_by_design,
    prediction_layers,
)
from engine_plugins.weights.loader.engine_tensors import ModelParameters
from engine_plugins.weights.loader.filled_elements import FilledElements
from engine_plugins.weights.loader.joined_traces import DRAFT
from engine_plugins.weights.loader.loader_threads import pools_done_here
from engine_plugins.weights.loader.loader_trace import LoaderTrace, LoadWeights, trace_loader
from engine_plugins.weights.loader.parameter_views import ParameterView, views_of_parameters
from engine_plugins.weights.loader.wrapped_layers import without_wrappers
from vllm_ext.draft_model import DraftModel
from vllm_ext.loader_model import loader_model
from vllm_ext.open_layer import (
    close_layer,
    layer_tensors,
    name_loaders,
    open_layer,
    renew_views,
)
from vllm_ext.tied_head import tie_as_the_live_one, was_tied_again

__all__ = ["VllmWeightInstaller"]

_RELOADED = (
    BaseKVCacheMethod,
    UnquantizedEmbeddingMethod,
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)
"""Ways of holding weights whose reload on the CPU was seen to be right."""


class VllmWeightInstaller:
    """The `WeightInstaller` of one vLLM worker, for its model and the one that drafts for it."""

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, draft: DraftModel | None = None
    ) -> None:
        self._vllm_config = vllm_config
        self._model = model
        self._draft = draft
        with self._plain():
            self._modules = dict(model.named_modules())
        self._models = [(model, vllm_config.model_config)]
        if draft is not None:
            self._modules |= draft.modules
            self._models.append((draft.model, draft.config))
        self._on_cpu = next(model.parameters()).device.type == "cpu"
        self._covered: dict[str, int] = {}
        self._views: dict[str, dict[str, Sequence[ParameterView]]] = {}
        """Of each layer, tensors that the model has in a parameter's memory when it is built."""

    def _plain(self) -> AbstractContextManager[None]:
        """The live model without the wrappers that vLLM puts around layers for LoRA."""
        return without_wrappers(self._model, BaseLayerWithLoRA)

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype that the engine serves in."""
        dtype = self._vllm_config.model_config.dtype
        if not isinstance(dtype, torch.dtype):
            raise WeightMismatchError(f"vLLM reports the model dtype {dtype!r}, not a torch dtype")
        return dtype

    def may_go_unused(self, name: str) -> bool:
        """Names that vLLM's loaders leave out by design."""
        config = self._vllm_config.model_config.hf_text_config
        return left_out_by_design(
            name,
            tied=bool(getattr(config, "tie_word_embeddings", False)) or self._tied_again(),
            predicting=prediction_layers(config),
        )

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        """Record the loader's copies on a second model without memory."""
        self._refuse_what_would_go_wrong()
        for model, _ in self._models:
            name_loaders(model)
        with loader_model(self._vllm_config) as model:
            if self._tied_again():
                tie_as_the_live_one(model)
            self._views = _by_layer(views_of_parameters(model))
            meant = [tensor for tensor in tensors if self._is_for_target(tensor.name)]
            trace = trace_loader(ModelParameters(model), _loader(model), meant)
        joined = trace if self._draft is None else self._draft.join(trace, tensors)
        joined = self._with_made_while_loading(joined)
        _refuse_deferred(joined, self._modules)
        self._covered = joined.covered_numel()
        return joined

    def _tied_again(self) -> bool:
        return was_tied_again(self._vllm_config.model_config, self._modules.values())

    def _with_made_while_loading(self, trace: LoaderTrace) -> LoaderTrace:
        """The trace with parameters that a loader makes when it meets their tensor.

        The second model has them only if the tensor was offered; the live one has them.
        """
        if self._vllm_config.quant_config is not None:
            return trace  # vLLM makes parameters of its own when it packs quantized weights
        traced = {name.rpartition(".")[0] for name in trace.parameter_numel}
        with self._plain():
            made = {
                name: each.numel()
                for name, each in self._model.named_parameters()
                if name.rpartition(".")[0] in traced
            }
        return replace(trace, parameter_numel={**made, **trace.parameter_numel})

    def _is_for_target(self, name: str) -> bool:
        """Whether the target's loader is to see a tensor: some refuse what others leave out."""
        return not self._is_for_draft(name) and not self.may_go_unused(name)

    def _is_for_draft(self, name: str) -> bool:
        """Whether the target's loader is not to see a tensor."""
        return self._draft is not None and name.startswith(DRAFT)

    def _refuse_what_would_go_wrong(self) -> None:
        """Models and settings with which vLLM installs something else, and says 200."""
        quantized = self._on_cpu and self._vllm_config.quant_config is not None
        for name, layer in self._modules.items():
            if quantized and _is_quantized(layer):
                raise UnsupportedError(
                    f"vLLM's reload of quantized weights on the CPU installs zeros, and {name} is "
                    "quantized",
                    remedy="serve the model unquantized, or on a GPU",
                )
            if getattr(layer, "is_amx_bmm_enabled", False):
                # The reload makes copies from kv_b_proj anew, which vLLM has emptied there.
                raise UnsupportedError(
                    f"vLLM cannot reload {name}: with AMX its latent attention keeps nothing of "
                    "its up-projection but packed copies",
                    remedy="serve with --attention-backend CPU_MLA",
                )
            if hasattr(layer, "sink_populated"):
                raise UnsupportedError(
                    f"{name} keeps sinks in the KV cache that it makes once from its weights",
                    remedy="restart the engine with the new weights",
                )
        if any(isinstance(layer, FusedMoEWithLoRA) for layer in self._model.modules()):
            raise UnsupportedError(
                "this engine was started with LoRA for experts, whose kernels vLLM's reload was "
                "not seen to keep",
                remedy="serve without --enable-lora, or with --lora-target-modules that leave "
                "the experts out",
            )
        if self._vllm_config.parallel_config.enable_eplb:
            raise UnsupportedError(
                "under expert load balancing (EPLB) experts move between ranks while they are "
                "loaded",
                remedy="serve without --enable-eplb",
            )

    def live_parameters(self) -> Mapping[str, torch.Tensor]:
        """The parameters and buffers that serve; a reload copies into them in the end."""
        drafting = {} if self._draft is None else self._draft.parameters()
        with self._plain():
            return {
                **dict(self._model.named_buffers()),
                **dict(self._model.named_parameters()),
                **drafting,
            }

    def begin(self) -> None:
        """Put every layer on meta, its kernel tensors kept aside."""
        with self._plain():
            for model, _ in self._models:
                layerwise.initialize_layerwise_reload(model)

    def install(self, modules: Sequence[str], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load the tensors of some modules and process those modules at once.

        It may be repeated with other tensors before `finish`.

        Raises:
            EngineCallError: the loader left out elements that it was seen to fill; the layer holds
                whatever its memory held.
        """
        layers = {name: self._modules[name] for name in modules}
        loaded = {n: each for n, each in layers.items() if not is_deferred_attention_layer(each)}
        if self._on_cpu:
            _forget_moe_kernels(list(loaded.values()))
        with torch.no_grad():
            for layer in loaded.values():
                open_layer(layer)
            filled = FilledElements(
                tensor for layer in loaded.values() for _, tensor in layer_tensors(layer)
            )
            with pools_done_here(), filled:
                self._load(tensors)
            self._refuse_holes(filled, loaded)
            for name, layer in loaded.items():
                renew_views(layer, self._views.get(name, {}), self._modules)
            for layer in loaded.values():
                close_layer(layer)
            for layer in layers.values():
                if is_deferred_attention_layer(layer):
                    _keep_scales(layerwise.get_layerwise_info(layer))
        if self._on_cpu:
            return_free_memory()

    def _load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        with self._plain():
            _loader(self._model)(each for each in tensors if not self._is_for_draft(each[0]))
        if self._draft is not None:
            self._draft.load(tensors)

    def _refuse_holes(self, filled: FilledElements, layers: Mapping[str, nn.Module]) -> None:
        """Compare what was loaded with what the trace saw of the same parameters."""
        for name, module in layers.items():
            for key, tensor in layer_tensors(module):
                numel, wanted = filled.of(tensor), self._covered.get(f"{name}.{key}", 0)
                if numel is not None and numel < wanted:
                    raise EngineCallError(
                        f"vLLM's loader filled {numel} of {wanted} elements of {name}.{key}",
                        remedy="report it: on placeholders the same loader filled them all",
                    )

    def landed(self, modules: Sequence[str]) -> None:
        """Give layers that have nothing to load the tensors back that serve."""
        for layer in (self._modules[name] for name in modules):
            info = layerwise.get_layerwise_info(layer)
            if info.can_load() and not is_deferred_attention_layer(layer):
                layerwise._place_kernel_tensors(layer, info)
                info.reset()

    def finish(self) -> None:
        """Put back what has nothing to load, and bring derived copies up to date."""
        with torch.no_grad(), self._plain():
            for model, config in self._models:
                layerwise.finalize_layerwise_reload(model, config)
        self._repack_tied_heads()

    def abandon(self) -> None:
        """Give every unfinished layer its old tensors back; loaded ones keep their new ones."""
        for layer in self._modules.values():
            info = layerwise.get_layerwise_info(layer)
            if info.can_load():
                info.load_numel = 0
                info.loaded_weights.clear()
        self.finish()

    def _repack_tied_heads(self) -> None:
        """A tied head shares the embedding's parameter but, on CPU, has a packed copy of its own.

        The reload processes the shared parameter for the embedding only; without this the old
        head goes on answering for the new body.
        """
        for layer in self._modules.values():
            if isinstance(layer, VocabParallelEmbedding) and _has_packed_copy(layer):
                layer.quant_method.process_weights_after_loading(layer)


def _by_layer(
    views: Mapping[str, Sequence[ParameterView]],
) -> dict[str, dict[str, Sequence[ParameterView]]]:
    found: dict[str, dict[str, Sequence[ParameterView]]] = {}
    for parameter, each in views.items():
        layer, _, key = parameter.rpartition(".")
        found.setdefault(layer, {})[key] = each
    return found


def _refuse_deferred(trace: LoaderTrace, modules: Mapping[str, nn.Module]) -> None:
    """Attention layers keep their memory until `finish`, and vLLM makes only their scales anew."""
    for copy in trace.copies:
        layer = modules.get(copy.parameter.rpartition(".")[0])
        if layer is None or not is_deferred_attention_layer(layer) or is_kv_scale(copy.parameter):
            continue
        raise UnsupportedError(
            f"vLLM's reload does not load {copy.parameter} anew: it belongs to an attention layer",
            remedy="report it, with the model's name",
        )


def _loader(model: nn.Module) -> LoadWeights:
    """The model's own loader, which torch's types do not know of."""
    return cast(LoadWeights, model.load_weights)


def _has_packed_copy(layer: nn.Module) -> bool:
    """Whether the CPU path built a second form of this layer's weight when it was loaded."""
    return hasattr(layer, "cpu_linear")


def _keep_scales(info: layerwise.LayerReloadingInfo) -> None:
    """Copy what an attention layer was fed: vLLM reads it in `finish`.

    By then the receive buffer has another module's bytes: every layer took the last one's scales.
    """
    for _, fed in info.loaded_weights:
        for name, value in fed.arguments.items():
            if name != "param" and isinstance(value, torch.Tensor):
                fed.arguments[name] = value.clone()


def _is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weights are quantized; scales of an FP8 KV cache reload rightly."""
    method = getattr(layer, "quant_method", None)
    return isinstance(method, QuantizeMethodBase) and not isinstance(method, _RELOADED)


def _forget_moe_kernels(layers: Sequence[nn.Module]) -> None:
    """Have experts on the CPU packed from scratch.

    With a kernel present vLLM takes the reload for an update of packed weights and, on the CPU,
    corrupts them without a word. On a GPU the kernel must stay: graphs have captured it.
    """
    for layer in layers:
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None
