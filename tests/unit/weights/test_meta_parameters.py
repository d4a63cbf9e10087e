"""Which parameters are moved to meta as they are registered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from torch import nn

from engine_plugins.weights.loader.meta_parameters import parameters_on_meta


def test_only_what_this_thread_builds_is_on_meta() -> None:
    """Another thread may build a model that is to be used."""
    with ThreadPoolExecutor(1) as another, parameters_on_meta():
        assert nn.Linear(2, 2).weight.is_meta
        assert not another.submit(nn.Linear, 2, 2).result().weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta
