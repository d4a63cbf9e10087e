"""Which modules bytes may land in: only those whose layout values have shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import nn

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.destination import destination_map
from engine_plugins.weights.loader.loader_trace import LoaderTrace, trace_loader
from engine_plugins.weights.receiving.landing import Landing
from tests.support.loader_maps import receiving, update
from tests.support.source_ranks import offered_tensors

NAME = "layer.weight"


class Permuted(nn.Module):
    """Serves from a square weight that it keeps transposed: same shape, other places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.packed = False

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            parameters[name].data.copy_(weight)

    def pack(self) -> None:
        self.layer.weight.data.copy_(self.layer.weight.data.T.clone())


class Installer:
    """Loads in place, and packs what it has loaded."""

    model_dtype = torch.float32

    def __init__(self, *, packs: bool) -> None:
        self.model = Permuted()
        self.packs = packs
        self.loads = 0

    def may_go_unused(self, name: str) -> bool:
        return False

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        with torch.device("meta"):
            twin = Permuted()
        return trace_loader(dict(twin.named_parameters()), twin.load_weights, tensors)

    def live_parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def begin(self) -> None:
        self.loads = 0

    def install(self, modules: Sequence[str], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.loads += 1
        with torch.no_grad():
            self.model.load_weights(tensors)
            if self.packs:
                self.model.pack()

    def landed(self, modules: Sequence[str]) -> None:
        pass

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        raise AssertionError("nothing fails here")


def landing_of(installer: Installer) -> tuple[Landing, dict[str, torch.Tensor]]:
    tensors = {name: torch.zeros_like(each) for name, each in installer.live_parameters().items()}
    told = [LogicalTensor(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()]
    trace = installer.trace(told)
    live = installer.live_parameters()
    return Landing(destination_map(trace, told), trace.layouts, live), tensors


def test_equal_values_that_show_nothing_do_not_let_a_module_in() -> None:
    """Nor do they keep it out: it may be compared again."""
    installer = Installer(packs=False)
    landing, tensors = landing_of(installer)
    installer.install(["layer"], list(tensors.items()))
    landing.compare(["layer"], tensors)
    assert landing.proven == set()
    assert "another layout" in landing.reasons["layer"]
    told = landing.pattern(["layer"], tensors)
    assert set(told) == {"layer.weight", "layer.bias"}
    installer.install(["layer"], list(told.items()))
    landing.compare(["layer"], told)
    assert landing.proven == {"layer"}


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
@pytest.mark.parametrize("packs", [True, False])
def test_a_constant_first_update_spoils_no_later_one(value: float, packs: bool) -> None:
    installer = Installer(packs=packs)
    memory = {n: torch.full_like(t, value) for n, t in installer.live_parameters().items()}
    with offered_tensors(memory) as trainer, receiving(installer) as receiver:
        update(receiver, [trainer])
        for round_ in range(2):
            for tensor in memory.values():
                tensor.copy_(torch.randn_like(tensor))
            report = update(receiver, [trainer])
            assert (report.direct_bytes > 0) == (not packs), round_
            weight = installer.model.layer.weight
            assert torch.equal(weight.T if packs else weight, memory[NAME])
            assert torch.equal(installer.model.layer.bias, memory["layer.bias"])


def test_values_that_tell_are_loaded_once() -> None:
    """A pattern is for those that do not."""
    installer = Installer(packs=False)
    memory = {n: torch.randn_like(t) for n, t in installer.live_parameters().items()}
    with offered_tensors(memory) as trainer, receiving(installer) as receiver:
        update(receiver, [trainer])
        assert installer.loads == 1
