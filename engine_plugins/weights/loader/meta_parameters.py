"""Building a model whose parameters have shapes and loaders, but no memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["moved_to_meta", "parameters_on_meta"]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move every parameter to meta as this thread registers it, so that only one exists at a time.

    The device context `torch.device("meta")` cannot be used instead: it also catches the small
    index tensors that expert parallelism reads back while the model is built.
    """
    register = nn.Module.register_parameter
    building = threading.get_ident()

    def register_on_meta(
        module: nn.Module, name: str, parameter: torch.nn.Parameter | None
    ) -> None:
        if parameter is not None and threading.get_ident() == building:
            parameter = _meta_twin(parameter)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def moved_to_meta(model: nn.Module) -> nn.Module:
    """The model, after each of its parameters was moved to meta; one of two names stays one.

    For models that read their parameters while they are built, or make them anew.
    """
    twins: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = twins.setdefault(id(parameter), _meta_twin(parameter))
    return model


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
