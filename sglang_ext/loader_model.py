"""A second copy of the engine's model that has loaders and shapes but no memory.

Built in the scheduler so that it is sharded as the live one. The loader can then be traced while
the live model serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from sglang.srt.layers.rotary_embedding import factory
from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
from sglang.srt.model_loader.utils import get_model_architecture, set_default_torch_dtype
from sglang.srt.models import transformers
from torch import nn

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.loader.meta_parameters import moved_to_meta, parameters_on_meta

__all__ = ["loader_model"]


@contextmanager
def loader_model(model_runner: Any) -> Iterator[nn.Module]:
    """Yield a model of this rank whose parameters are on the meta device.

    SGLang's process-wide tables (the rotary cache, the experts that transformers' code finds by
    name) are put back as they were, or the live model would be given the second one's.

    Raises:
        UnsupportedError: the model cannot be built a second time.
    """
    config, load_config = model_runner.model_config, model_runner.load_config

    def build() -> nn.Module:
        quantization = _get_quantization_config(config, load_config)
        return cast(nn.Module, _initialize_model(config, load_config, quantization))

    model_class, _ = get_model_architecture(config)
    with set_default_torch_dtype(config.dtype), _tables_untouched():
        try:
            if issubclass(model_class, transformers.TransformersBase):
                model = _built_in_host_memory(build)
            else:
                with torch.device(model_runner.device), parameters_on_meta():
                    model = build()
        except RuntimeError as error:
            raise UnsupportedError(
                f"SGLang cannot build a second {model_class.__name__}, to show what its loader "
                f"does: {error}",
                remedy="restart the engine with the new weights",
            ) from error
    yield model


def _built_in_host_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """A model of SGLang's Transformers backend, moved to meta once it is whole.

    It looks at values of norms, and makes parameters that it finds on meta anew, without their
    loaders. Most memory is not written to before a load, so it never becomes resident.
    """
    with torch.device("cpu"):
        return moved_to_meta(build())


@contextmanager
def _tables_untouched() -> Iterator[None]:
    tables = (factory._ROPE_DICT, transformers._TRANSFORMERS_MOE_LAYERS)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
