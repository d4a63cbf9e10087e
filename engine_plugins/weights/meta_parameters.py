"""Building a model whose parameters have shapes and loaders, but no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["parameters_on_meta"]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
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
