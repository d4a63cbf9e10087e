"""A second copy of the engine's model that has loaders and shapes but no memory.

Built in the worker so that it is sharded as the live one. The loader can then be traced while
the live model serves. Known to work on vLLM 0.32; see docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from engine_plugins.weights.loader.meta_parameters import parameters_on_meta

__all__ = ["loader_model"]


@contextmanager
def loader_model(
    vllm_config: VllmConfig, model_config: ModelConfig | None = None
) -> Iterator[nn.Module]:
    """Yield a model of this rank whose parameters are on the meta device.

    It is the served one, or that of another configuration under the same settings (a draft model).

    What building a model leaves behind in vLLM's process-wide tables (the layers known to the
    forward context, the rotary cache) is put back as it was, or the live model would be given
    the second one's layers.

    Most parameters take torch's default dtype, which vLLM sets to the model's while it builds one.
    """
    dtype = (model_config or vllm_config.model_config).dtype
    with (
        _tables_untouched(vllm_config),
        set_default_torch_dtype(cast(torch.dtype, dtype)),
        parameters_on_meta(),
    ):
        model = initialize_model(vllm_config, model_config=model_config)
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
