"""Layers that are written from others' traces: which, and that nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch

from engine_plugins.errors import WeightMismatchError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.alike_layers import AlikeLayers
from engine_plugins.weights.loader.loader_trace import LoaderTrace, trace_loader
from engine_plugins.weights.loader.loader_watch import WatchedCopies, following

LAYERS, EXPERTS, SIZE = 12, 3, (4, 2)
PARTS = ("q", "k", *(f"experts.{expert}" for expert in range(EXPERTS)))

Weights = Iterable[tuple[str, torch.Tensor]]
Parameters = dict[str, torch.Tensor]
Loader = Callable[[Parameters, Weights], None]


def tensor(name: str, *shape: int) -> LogicalTensor:
    return LogicalTensor(name=name, shape=shape or SIZE, dtype=torch.float32)


def checkpoint(layers: Iterable[int] = range(LAYERS)) -> list[LogicalTensor]:
    inner = [tensor(f"model.layers.{layer}.{part}") for layer in layers for part in PARTS]
    return [tensor("embed"), *inner, tensor("head")]


def model(layers: Iterable[int] = range(LAYERS)) -> Parameters:
    """Parameters of an engine that fuses q and k, and experts; the norm has padding."""
    shapes: dict[str, tuple[int, ...]] = {"embed.w": SIZE}
    for layer in layers:
        shapes[f"layers.{layer}.qk.w"] = (2 * SIZE[0] + 1, SIZE[1])
        shapes[f"layers.{layer}.experts.w"] = (EXPERTS, *SIZE)
    return {
        name: torch.empty(shape, device="meta")
        for name, shape in {**shapes, "head.w": SIZE}.items()
    }


def load(parameters: Parameters, weights: Weights) -> None:
    """What engines do: fuse, stack, fill padding, and skip what is another rank's."""
    for name, weight in weights:
        if "layers" not in name:
            parameters[f"{name}.w"].copy_(weight)
            continue
        _, _, number, part, *expert = name.split(".")
        if f"layers.{number}.qk.w" not in parameters:
            continue
        if expert:
            parameters[f"layers.{number}.experts.w"][int(expert[0])].copy_(weight)
        else:
            row = SIZE[0] * "qk".index(part)
            parameters[f"layers.{number}.qk.w"][row : row + SIZE[0]].copy_(weight)
            if part == "k":
                parameters[f"layers.{number}.qk.w"][2 * SIZE[0] :].fill_(0)


def traced(
    loader: Loader, parameters: Parameters, tensors: list[LogicalTensor]
) -> tuple[LoaderTrace, list[str]]:
    """The trace, and the names that the loader was handed last."""
    runs: list[list[str]] = []

    def noting(weights: Weights) -> Iterable[tuple[str, torch.Tensor]]:
        runs.append([])
        for name, weight in weights:
            runs[-1].append(name)
            yield name, weight

    trace = trace_loader(parameters, lambda weights: loader(parameters, noting(weights)), tensors)
    return trace, runs[-1]


def whole(loader: Loader, parameters: Parameters, tensors: list[LogicalTensor]) -> list[object]:
    """Every copy of a loader that is handed everything."""
    copies = WatchedCopies(parameters)
    feed = [(t.name, torch.empty(t.shape, dtype=t.dtype, device="meta")) for t in tensors]
    for name, placeholder in feed:
        copies.add_source(name, placeholder)
    with following(copies):
        loader(parameters, feed)
    return list(copies.copies)


def layers_in(names: Iterable[str]) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in names if "layers" in name})


def test_three_layers_of_a_kind_are_shown_and_all_are_in_the_trace() -> None:
    trace, fed = traced(load, model(), checkpoint())
    assert layers_in(fed) == [0, 6, 11]
    assert list(trace.copies) == whole(load, model(), checkpoint())
    assert trace.covered_numel() == trace.parameter_numel


def test_three_layers_or_fewer_are_all_shown() -> None:
    _, fed = traced(load, model(range(3)), checkpoint(range(3)))
    assert layers_in(fed) == [0, 1, 2]


def test_the_order_of_the_feed_is_kept_where_layers_come_in_pieces() -> None:
    """Ranks of an expert-parallel trainer each offer some experts of every layer."""
    tensors = checkpoint()
    tensors.sort(key=lambda each: "experts.2" in each.name)
    trace, fed = traced(load, model(), tensors)
    assert len(layers_in(fed)) == 3
    assert list(trace.copies) == whole(load, model(), tensors)


def test_layers_of_two_kinds_that_take_turns_are_told_apart() -> None:
    """Every other layer has one tensor more; the engine holds a parameter for it."""

    def with_gates(parameters: Parameters, weights: Weights) -> None:
        rest = []
        for name, weight in weights:
            if name.endswith("gate"):
                parameters[f"{name.removeprefix('model.')}.w"].copy_(weight)
            else:
                rest.append((name, weight))
        load(parameters, rest)

    parameters, tensors = model(), checkpoint()
    for layer in range(0, LAYERS, 2):
        parameters[f"layers.{layer}.gate.w"] = torch.empty(SIZE, device="meta")
        tensors.append(tensor(f"model.layers.{layer}.gate"))
    tensors.sort(key=lambda each: not each.name.endswith("gate"))
    trace, fed = traced(with_gates, parameters, tensors)
    assert layers_in(fed) == [0, 1, 6, 7, 10, 11]
    assert list(trace.copies) == whole(with_gates, parameters, tensors)


def test_a_layer_whose_tensor_or_parameter_has_another_shape_is_shown_itself() -> None:
    """So the loader refuses it by name, or it shows as uncovered."""
    tensors = checkpoint()
    tensors[7 * len(PARTS) + 1] = tensor("model.layers.7.q", 5, 2)
    with pytest.raises(WeightMismatchError, match=r"^model\.layers\.7\.q"):
        traced(load, model(), tensors)
    parameters = model()
    parameters["layers.7.experts.w"] = torch.empty(EXPERTS + 1, *SIZE, device="meta")
    trace, _ = traced(load, parameters, checkpoint())
    covered, wanted = trace.covered_numel(), trace.parameter_numel
    assert [name for name in wanted if covered[name] != wanted[name]] == ["layers.7.experts.w"]


def test_layers_of_another_pipeline_stage_stay_empty() -> None:
    """The checkpoint has them, this rank's engine does not: the loader passes them by."""
    here = range(4, 10)
    trace, fed = traced(load, model(here), checkpoint())
    assert layers_in(fed) == [0, 3, 4, 7, 9, 11]
    assert list(trace.copies) == whole(load, model(here), checkpoint())
    assert trace.sources() == {each.name for each in checkpoint(here)}


@pytest.mark.parametrize("odd", [0, 6, 11])
def test_a_shown_layer_that_is_treated_otherwise_has_all_be_shown(odd: int) -> None:
    """Its fused halves change places; the trace is that of a loader that saw everything."""

    def swapping(parameters: Parameters, weights: Weights) -> None:
        for name, weight in weights:
            if name == f"model.layers.{odd}.q":
                name = f"model.layers.{odd}.k"
            elif name == f"model.layers.{odd}.k":
                name = f"model.layers.{odd}.q"
            load(parameters, [(name, weight)])

    trace, fed = traced(swapping, model(), checkpoint())
    assert layers_in(fed) == list(range(LAYERS))
    assert list(trace.copies) == whole(swapping, model(), checkpoint())


def test_layers_that_share_one_parameter_are_all_shown() -> None:
    """Stacked over layers: the place depends on the number."""

    def stacking(parameters: Parameters, weights: Weights) -> None:
        for name, weight in weights:
            parameters["all.w"][int(name.split(".")[1])].copy_(weight)

    parameters = {"all.w": torch.empty(LAYERS, *SIZE, device="meta")}
    tensors = [tensor(f"layer.{layer}.w") for layer in range(LAYERS)]
    trace, fed = traced(stacking, parameters, tensors)
    assert len(fed) == LAYERS
    assert trace.covered_numel() == trace.parameter_numel


def test_a_loader_that_goes_back_over_its_tensors_is_shown_all_of_them() -> None:
    """Where a copy comes in its order could not be said of the layers between."""

    def backwards(parameters: Parameters, weights: Weights) -> None:
        load(parameters, list(weights)[::-1])

    trace, fed = traced(backwards, model(), checkpoint())
    assert layers_in(fed) == list(range(LAYERS))
    assert list(trace.copies) == whole(backwards, model(), checkpoint())


def test_copies_that_two_layers_have_a_part_in_speak_for_none() -> None:
    """No engine's loader makes one; a trace that has one is not completed."""
    tensors = [(f"l.{layer}.w", SIZE) for layer in range(4)]
    parameters = {f"l.{layer}.w": torch.empty(SIZE, device="meta") for layer in range(4)}

    def joining(parameters: Parameters, weights: Weights) -> None:
        first, *_, last = (weight for _, weight in weights)
        parameters["l.0.w"].copy_(first + last)

    alike = AlikeLayers(tensors, dict.fromkeys(parameters, SIZE))
    shown = [tensor(tensors[place][0]) for place in alike.samples]
    assert [each.name for each in shown] == ["l.0.w", "l.2.w", "l.3.w"]
    copies = WatchedCopies(parameters)
    feed = [(t.name, torch.empty(t.shape, device="meta")) for t in shown]
    for name, placeholder in feed:
        copies.add_source(name, placeholder)
    with following(copies):
        joining(parameters, feed)
    assert alike.completed(copies.copies) is None
