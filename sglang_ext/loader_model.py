"""A second copy of the engine's model that has loaders and shapes but no memory.

Built in the scheduler so that it is sharded as the live one. The loader can then be traced while
the live model serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.layers.rotary_embedding import factory
from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from torch import nn

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.loader.meta_parameters import parameters_on_meta

__all__ = ["loader_model"]


@contextmanager
def loader_model(model_runner: Any) -> Iterator[nn.Module]:
    """Yield a model of this rank whose parameters are on the meta device.

    SGLang's process-wide rotary cache is put back as it was, or a later model would be given the
    second one's tensors.

    Raises:
        UnsupportedError: the model reads values of its parameters while it is built.
    """
    config, load_config = model_runner.model_config, model_runner.load_config
    quantization = _get_quantization_config(config, load_config)
    rotary = dict(factory._ROPE_DICT)
    try:
        with (
            set_default_torch_dtype(config.dtype),
            torch.device(model_runner.device),
            parameters_on_meta(),
        ):
            model = _initialize_model(config, load_config, quantization)
    except RuntimeError as error:
        raise UnsupportedError(
            f"SGLang cannot build this model without memory, to show what its loader does: {error}",
            remedy="restart the engine with the new weights",
        ) from error
    finally:
        factory._ROPE_DICT.clear()
        factory._ROPE_DICT.update(rotary)
    yield model
