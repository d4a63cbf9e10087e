"""What the families ask of an engine beyond `tests.support.loader_maps`: a load as its own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from engine_plugins.weights.loader.weight_installer import WeightInstaller

__all__ = ["LOADED_RANKS", "LoadedSglang", "LoadedVllm"]


class LoadedVllm:
    """A played rank of vLLM that has loaded its folder as a worker does, packing included."""

    def __init__(self, rank: Any) -> None:
        loading = import_module("vllm.model_executor.model_loader.default_loader")
        settings = import_module("vllm.config.load").LoadConfig(
            load_format="safetensors", use_tqdm_on_load=False
        )
        # vLLM's runner of the CPU begins with this; its loader asks for an accelerator otherwise.
        import_module("vllm.v1.worker.cpu_model_runner")._set_torch_accelerator_to_noop()
        self._config = rank.config
        self.model: nn.Module = loading.DefaultModelLoader(settings).load_model(
            vllm_config=rank.config, model_config=rank.config.model_config
        )

    def installer(self) -> WeightInstaller:
        """The product's own."""
        installers = import_module("vllm_ext.weight_installer")
        installer: WeightInstaller = installers.VllmWeightInstaller(self._config, self.model)
        return installer

    def computed(self) -> dict[str, torch.Tensor]:
        """What packed linear layers make of fixed inputs.

        Some of vLLM's CPU kernels keep the weights where Python cannot look.
        """
        found: dict[str, torch.Tensor] = {}
        for name, layer in self.model.named_modules():
            compute = vars(layer).get("cpu_linear")
            if compute is not None:
                found[f"{name}.cpu_linear()"] = _applied(layer, compute, self._dtype())
        return found

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._config.model_config.dtype
        return dtype


def _applied(layer: Any, compute: Any, dtype: torch.dtype) -> torch.Tensor:
    sizes = ("input_size_per_partition", "input_size", "embedding_dim")
    width = next(getattr(layer, name) for name in sizes if hasattr(layer, name))
    inputs = torch.linspace(-1, 1, 2 * width, dtype=torch.float32).view(2, width).to(dtype)
    with torch.no_grad():
        result: torch.Tensor = compute(inputs, layer.weight, getattr(layer, "bias", None))
    return result


class LoadedSglang:
    """A played rank of SGLang that has loaded its folder as a scheduler does, packing included."""

    def __init__(self, rank: Any) -> None:
        loading = import_module("sglang.srt.model_loader.loader")
        load = import_module("sglang.srt.configs.load_config")
        device = import_module("sglang.srt.configs.device_config")
        self._rank = rank
        settings = load.LoadConfig(load_format="safetensors")
        adjusting = import_module("sglang.srt.configs.update_config")
        adjusting.adjust_config_with_unaligned_cpu_tp(
            rank.config, settings, 1
        )  # as its runner does
        self.model: nn.Module = loading.get_model_loader(settings, rank.config).load_model(
            model_config=rank.config, device_config=device.DeviceConfig("cpu")
        )

    def installer(self) -> WeightInstaller:
        """The product's own."""
        installer: WeightInstaller = self._rank.installer(self.model)
        return installer

    def computed(self) -> dict[str, torch.Tensor]:
        """Nothing: every packed weight is a tensor of Python's."""
        return {}


LOADED_RANKS: dict[str, type[LoadedVllm | LoadedSglang]] = {
    "vllm": LoadedVllm,
    "sglang": LoadedSglang,
}
