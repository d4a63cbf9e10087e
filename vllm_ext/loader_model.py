"""A second copy of the engine's model that has loaders and shapes but no memory.

Built in the worker so that it is sharded as the live one. The loader can then be traced while
the live model serves. Known to work on vLLM 0.32; see docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.utils import initialize_model

__all__ = ["loader_model"]


@contextmanager
def loader_model(vllm_config: VllmConfig) -> Iterator[nn.Module]:
    """Yield a model of this rank whose parameters are on the meta device.

    What building a model leaves behind in vLLM's process-wide tables (the layers known to the
    forward context, the rotary cache) is put back as it was, or the live model would be given
    the second one's layers.
    """
    with _tables_untouched(vllm_config), _parameters_on_meta():
        model = initialize_model(vllm_config)
    yield model


@contextmanager
def _tables_untouched(vllm_config: VllmConfig) -> Iterator[None]:
    compilation = vllm_config.compilation_config
    layers = compilation.static_forward_context
    moe_layers = compilation.static_all_moe_layers
    rotary = dict(rotary_embedding._ROPE_DICT)
    compilation.static_forward_context = {}
    compilation.static_all_moe_layers = []
    try:
        yield
    finally:
        compilation.static_forward_context = layers
        compilation.static_all_moe_layers = moe_layers
        rotary_embedding._ROPE_DICT.clear()
        rotary_embedding._ROPE_DICT.update(rotary)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to meta as it is registered, so that only one exists at a time.

    The device context `torch.device("meta")` cannot be used instead: it also catches the small
    index tensors that expert parallelism reads back while the model is built.
    """
    register = nn.Module.register_parameter

    def register_on_meta(
        module: nn.Module, name: str, parameter: torch.nn.Parameter | None
    ) -> None:
        register(module, name, None if parameter is None else _meta_twin(parameter))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _meta_twin(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The parameter on meta; attributes set on the original later reach the twin as well.

    A parameter that is registered a second time (a tied output head) keeps its one twin.
    """
    if parameter.is_meta:
        return parameter
    twin = parameter.data.to("meta")
    twin.__class__ = parameter.__class__
    twin.__dict__ = parameter.__dict__
    return twin  # type: ignore[return-value]
