"""What a loader writes besides parameters: buffers, derived tensors, single elements."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from engine_plugins.errors import UnsupportedError, WeightMismatchError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.coverage import engine_steps
from engine_plugins.weights.loader.destination import destination_map
from engine_plugins.weights.loader.engine_tensors import ModelParameters
from engine_plugins.weights.loader.loader_trace import LoaderTrace, trace_loader
from engine_plugins.weights.loader.meta_parameters import parameters_on_meta
from engine_plugins.weights.loader.own_checkpoint import left_as_built

Load = Callable[["Model", str, torch.Tensor], None]
SHAPES = {"norm.weight": (8,), "norm.scalar": (1,), "head.weight": (8, 8)}


class Rules:
    model_dtype = torch.float32

    def may_go_unused(self, name: str) -> bool:
        return False


class Norm(nn.Module):
    derived: torch.Tensor
    scalar: torch.Tensor
    _own: torch.Tensor
    constant: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.register_buffer("scalar", torch.ones(1))
        self.register_buffer("_own", torch.ones(1))
        self.register_buffer("constant", torch.full((3,), 0.5))
        self.register_buffer("derived", torch.ones(8), persistent=False)
        self.plain = torch.ones(8)


class Model(nn.Module):
    """Loads by name whatever it has under it, as many engines do."""

    def __init__(
        self, load: Load | None = None, end: Callable[[Model], None] | None = None
    ) -> None:
        super().__init__()
        self.norm = Norm()
        self.head = nn.Linear(8, 8, bias=False)
        self.load = load or Model.plainly
        self.end = end

    def plainly(self, name: str, weight: torch.Tensor) -> None:
        held = {**dict(self.named_parameters()), "norm.scalar": self.norm.scalar}
        held[name].data.copy_(weight)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            self.load(self, name, weight)
        if self.end is not None:
            self.end(self)


def logical(*names: str, dtype: torch.dtype = torch.float32) -> list[LogicalTensor]:
    return [LogicalTensor(name=name, shape=SHAPES[name], dtype=dtype) for name in names]


def traced(model: Callable[[], Model], *names: str, may_load_whole: bool = False) -> LoaderTrace:
    with parameters_on_meta():
        made = model()
    told = logical(*(names or SHAPES))
    return trace_loader(
        ModelParameters(made), made.load_weights, told, may_load_whole=may_load_whole
    )


def test_a_buffer_that_a_loader_fills_is_covered_and_has_its_place() -> None:
    trace = traced(Model)
    assert trace.parameter_numel == {"norm.weight": 8, "head.weight": 64, "norm.scalar": 1}
    steps, unused = engine_steps(trace, logical(*SHAPES), Rules())
    assert [modules for modules, _ in steps] == [["norm"], ["head"]]
    assert unused == []
    placed = destination_map(trace, logical(*SHAPES))
    assert placed.reasons == {}
    assert {box.parameter for box in placed.boxes["norm"]} == {"norm.weight", "norm.scalar"}


def test_a_buffer_that_a_loader_would_fill_is_missed_if_it_is_left_out() -> None:
    """The engine's own constants are not, whether or not a checkpoint could hold them."""
    trace = traced(Model, "norm.weight", "head.weight")
    with pytest.raises(WeightMismatchError, match=r"norm\.scalar") as caught:
        engine_steps(trace, logical("norm.weight", "head.weight"), Rules())
    assert "constant" not in caught.value.message
    assert "_own" not in caught.value.message


def test_a_missing_buffer_is_asked_for_under_the_checkpoints_prefix() -> None:
    """The checkpoint calls everything under `model.` what the engine calls without it."""

    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        assert name.startswith("model.")
        model.plainly(name.removeprefix("model."), weight)

    with parameters_on_meta():
        made = Model(load)
    told = [
        LogicalTensor(name=f"model.{name}", shape=SHAPES[name], dtype=torch.float32)
        for name in ("norm.weight", "head.weight")
    ]
    trace = trace_loader(ModelParameters(made), made.load_weights, told)
    assert trace.parameter_numel["norm.scalar"] == 1


def test_an_element_that_is_read_as_a_number_is_a_copy() -> None:
    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        if name == "norm.scalar":
            model.norm.scalar.fill_(weight.item())
        else:
            model.plainly(name, weight)

    trace = traced(lambda: Model(load))
    (copy,) = [copy for copy in trace.copies if copy.parameter == "norm.scalar"]
    assert (copy.sources, copy.pure) == (("norm.scalar",), True)
    assert destination_map(trace, logical(*SHAPES)).reasons == {}


def test_a_number_that_is_computed_with_counts_as_unread() -> None:
    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        if name == "norm.scalar":
            model.norm.weight.data.fill_(weight.item() * 2)
        else:
            model.plainly(name, weight)

    trace = traced(lambda: Model(load))
    assert "norm.scalar" not in trace.sources()


DERIVING: dict[str, Callable[[Norm], object]] = {
    "a buffer": lambda norm: norm.derived.copy_(norm.weight.data).add_(1.0),
    "out": lambda norm: torch.add(norm.weight.data, 1.0, out=norm.derived),
    "an attribute": lambda norm: norm.plain.copy_(norm.weight.data + 1),
    "a new attribute": lambda norm: setattr(norm, "plain", norm.weight.data + 1),
    "what was not there": lambda norm: setattr(norm, "fresh", norm.weight.data.clone()),
}


@pytest.mark.parametrize("how", DERIVING)
def test_a_module_from_which_something_is_derived_does_not_land(how: str) -> None:
    """Landing in its parameter would leave the other tensor as it was."""

    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        model.plainly(name, weight)
        if name == "norm.weight":
            DERIVING[how](model.norm)

    trace = traced(lambda: Model(load))
    steps, _ = engine_steps(trace, logical(*SHAPES), Rules())
    placed = destination_map(trace, logical(*SHAPES))
    assert set(placed.boxes) == {"head"}
    assert "computes norm." in placed.reasons["norm"]
    assert [modules for modules, _ in steps] == [["norm"], ["head"]]


def test_what_another_module_derives_keeps_the_step_from_landing() -> None:
    """The two are loaded in one step, and a step lands as a whole or not at all."""

    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        model.plainly(name, weight)
        if name == "head.weight":
            model.norm.plain.copy_(model.head.weight.data[0] * 2)

    trace = traced(lambda: Model(load))
    steps, _ = engine_steps(trace, logical(*SHAPES), Rules())
    assert [sorted(modules) for modules, _ in steps] == [["head", "norm"]]
    assert "norm" in destination_map(trace, logical(*SHAPES)).reasons


def test_a_loader_that_scales_what_it_loaded_before_is_refused() -> None:
    """Called once for each module, it would scale again at every call."""

    def scale(model: Model) -> None:
        model.norm.weight.data.mul_(3.0)

    with pytest.raises(UnsupportedError, match=r"norm\.weight"):
        traced(lambda: Model(end=scale))


def test_a_loader_that_wants_everything_at_once_is_refused() -> None:
    seen: set[str] = set()

    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        seen.add(name)
        model.plainly(name, weight)

    def count(model: Model) -> None:
        missing = SHAPES.keys() - seen
        seen.clear()
        if missing:
            raise RuntimeError(f"{len(missing)} tensors were not loaded")

    with pytest.raises(UnsupportedError, match=r"alone.*were not loaded"):
        traced(lambda: Model(load, end=count))
    trace = traced(lambda: Model(load, end=count), may_load_whole=True)
    steps, unused = engine_steps(trace, logical(*SHAPES), Rules())
    assert [sorted(tensor.name for tensor in tensors) for _, tensors in steps] == [sorted(SHAPES)]
    assert unused == []


def test_a_buffer_is_missed_by_a_loader_that_wants_everything_at_once() -> None:
    """Asked for one tensor alone it would only say that the others are not there."""
    seen: set[str] = set()

    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        seen.add(name)
        model.plainly(name, weight)

    def count(model: Model) -> None:
        missing = {"norm.weight", "head.weight"} - seen
        seen.clear()
        if missing:
            raise RuntimeError(f"{len(missing)} tensors were not loaded")

    parameters = ("norm.weight", "head.weight")
    trace = traced(lambda: Model(load, end=count), *parameters, may_load_whole=True)
    assert trace.whole
    with pytest.raises(WeightMismatchError, match=r"norm\.scalar"):
        engine_steps(trace, logical(*parameters), Rules())


def test_what_a_loader_copies_in_a_pool_of_threads_is_seen() -> None:
    """In the loader's own order, and a pool of another thread is left alone."""

    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        with ThreadPoolExecutor(2) as pool:
            pool.submit(model.plainly, name, weight).result()

    with ThreadPoolExecutor(1) as another:
        trace = traced(lambda: Model(load))
        assert another.submit(threading.get_ident).result() != threading.get_ident()
    assert [copy.sources for copy in trace.copies] == [(name,) for name in SHAPES]
    assert trace.fills_exactly()


def test_an_error_in_a_loaders_pool_is_the_loaders() -> None:
    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        with ThreadPoolExecutor(2) as pool:
            pool.submit(model.plainly, f"{name}s", weight).result()

    with pytest.raises(WeightMismatchError, match=r"norm\.weight: .*KeyError"):
        traced(lambda: Model(load))


def test_what_the_engines_own_checkpoint_leaves_as_it_was_built_may_be_left() -> None:
    """Falcon-H1 has no norms where SGLang has some; a head is what a trainer has tied."""
    offered = logical("norm.weight", "norm.scalar")
    with parameters_on_meta():
        model = Model()
    parameters = ModelParameters(model)

    def again(tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        return trace_loader(parameters, model.load_weights, tensors)

    trace = again(offered)
    with pytest.raises(WeightMismatchError, match=r"head\.weight has 64 elements, and no tensor"):
        engine_steps(trace, offered, Rules())
    for own, fits in ((offered, True), (logical(*SHAPES), False), ([], False)):
        left = left_as_built(trace, partial(list, own), again)
        assert (left.parameter_numel["head.weight"] == 0) is fits
    assert left_as_built(again(logical(*SHAPES)), lambda: pytest.fail("asked"), again)


def test_a_loader_that_changes_what_it_has_just_loaded_is_none_of_these() -> None:
    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        model.plainly(name, weight)
        if name == "norm.weight":
            model.norm.weight.data.add_(1.0)

    trace = traced(lambda: Model(load))
    assert "norm" in destination_map(trace, logical(*SHAPES)).reasons


def test_a_parameter_that_a_loader_makes_for_its_tensor_is_covered() -> None:
    """A head of vLLM's Transformers backend gets a bias when there is one."""

    def load(model: Model, name: str, weight: torch.Tensor) -> None:
        if name == "norm.scalar":
            model.head.bias = nn.Parameter(torch.zeros(1))
            model.head.bias.data.copy_(weight)
        else:
            model.plainly(name, weight)

    trace = traced(lambda: Model(load))
    assert trace.parameter_numel == {"norm.weight": 8, "head.weight": 64, "head.bias": 1}
    assert trace.fills_exactly()
    assert destination_map(trace, logical(*SHAPES)).reasons == {}
