"""What is recorded of loaders that do what engines' loaders do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from engine_plugins.errors import WeightMismatchError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.engine_tensors import ModelParameters
from engine_plugins.weights.loader.loader_trace import LoaderTrace, TracedCopy, trace_loader

Weights = Iterable[tuple[str, torch.Tensor]]
Loader = Callable[[dict[str, torch.Tensor], Weights], None]


def tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> LogicalTensor:
    return LogicalTensor(name=name, shape=shape, dtype=dtype)


def traced(
    shapes: dict[str, tuple[int, ...]],
    loader: Loader,
    *tensors: LogicalTensor,
    dtype: torch.dtype = torch.float32,
) -> LoaderTrace:
    """Trace a loader over parameters of these shapes."""
    parameters = {
        name: nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        for name, shape in shapes.items()
    }
    plain: dict[str, torch.Tensor] = {name: each.data for name, each in parameters.items()}
    return trace_loader(parameters, lambda weights: loader(plain, weights), list(tensors))


def into_w(change: Callable[[torch.Tensor], torch.Tensor]) -> Loader:
    """A loader that puts what `change` makes of each tensor into the parameter `m.w`."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        for _, weight in weights:
            parameters["m.w"].copy_(change(weight))

    return load


def only(trace: LoaderTrace) -> TracedCopy:
    (copy,) = trace.copies
    return copy


def test_a_fused_parameter_is_filled_by_the_tensors_that_reach_its_parts() -> None:
    """Query, key and value narrowed into one: places, names, purity and full coverage."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        fused = parameters["attn.qkv.weight"]
        for name, weight in weights:
            first, rows = {"q": (0, 8), "k": (8, 2), "v": (10, 2)}[name]
            fused.narrow(0, first, rows).copy_(weight)

    trace = traced(
        {"attn.qkv.weight": (12, 4)}, load, tensor("q", 8, 4), tensor("k", 2, 4), tensor("v", 2, 4)
    )
    assert [(c.sources, c.offset, c.shape, c.strides) for c in trace.copies] == [
        (("q",), 0, (8, 4), (4, 1)),
        (("k",), 32, (2, 4), (4, 1)),
        (("v",), 40, (2, 4), (4, 1)),
    ]
    assert all(copy.pure and copy.parameter == "attn.qkv.weight" for copy in trace.copies)
    assert trace.covered_numel() == trace.parameter_numel == {"attn.qkv.weight": 48}
    assert trace.modules() == {"attn.qkv": ["q", "k", "v"]}
    assert trace.sources() == {"q", "k", "v"}


def test_a_shard_of_a_tensor_is_still_that_tensor() -> None:
    """A tensor-parallel rank takes a narrow view of the placeholder; nothing is computed."""
    trace = traced({"m.w": (4, 4)}, into_w(lambda w: w.narrow(1, 4, 4)), tensor("w", 4, 8))
    assert (only(trace).sources, only(trace).pure) == (("w",), True)


PURE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda w: w,
    "transposed": lambda w: w.t(),
    "reshaped": lambda w: w.view(2, 2, 4).reshape(4, 4),
    "detached": lambda w: w.detach().data,
    "indexed": lambda w: w[None][0],
}

COMPUTED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cast": lambda w: w.to(torch.bfloat16),
    "arithmetic": lambda w: w * 2 + 1,
    "arithmetic in place": lambda w: w.mul_(2),
    "arithmetic in place on a view": lambda w: (w[:2].add_(1), w)[1],
    "exponential": lambda w: -torch.exp(w),
    "clone": torch.clone,
    "gathered by a list of rows": lambda w: w[[3, 2, 1, 0]],
    "written into a buffer first": lambda w: torch.empty(4, 4, device="meta").copy_(w),
}


@pytest.mark.parametrize("change", PURE.values(), ids=PURE)
def test_views_are_pure(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A view moves no value: the source's bytes are the parameter's bytes."""
    assert only(traced({"m.w": (4, 4)}, into_w(change), tensor("w", 4, 4))).pure


@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
def test_what_the_loader_computes_is_told_from_a_copy(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Such a tensor must go through the loader; its name is known all the same."""
    copy = only(traced({"m.w": (4, 4)}, into_w(change), tensor("w", 4, 4)))
    assert (copy.sources, copy.pure) == (("w",), False)


def test_a_cast_in_the_copy_is_not_pure_and_says_both_dtypes() -> None:
    """The parameter's dtype differs from the tensor's: the copy itself changes the bytes."""
    trace = traced({"m.w": (4, 4)}, into_w(lambda w: w), tensor("w", 4, 4), dtype=torch.float16)
    copy = only(trace)
    assert (copy.source_dtype, copy.parameter_dtype) == (torch.float32, torch.float16)
    assert not copy.pure


def test_a_broadcast_is_not_pure() -> None:
    """One element becomes many: the parameter's bytes are not the tensor's."""
    trace = traced({"m.w": (4, 4)}, into_w(lambda w: w), tensor("w", 1))
    assert not only(trace).pure
    assert trace.covered_numel() == {"m.w": 16}


def test_tensors_that_are_joined_first_are_all_named() -> None:
    """By cat, or piece by piece in a buffer: every one of them reached the parameter."""

    def by_cat(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        parameters["mlp.w"].copy_(torch.cat([weight for _, weight in weights]))

    def by_buffer(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        buffer = torch.empty(4, 3, device="meta")
        for row, (_, weight) in enumerate(weights):
            buffer[2 * row : 2 * row + 2].copy_(weight)
        parameters["mlp.w"].copy_(buffer)

    for load in (by_cat, by_buffer):
        trace = traced({"mlp.w": (4, 3)}, load, tensor("gate", 2, 3), tensor("up", 2, 3))
        assert (only(trace).sources, only(trace).pure) == (("gate", "up"), False)


def test_padding_that_the_loader_fills_counts_as_covered_and_has_no_source() -> None:
    """A vocabulary padded to a multiple: rows and zeros together are the whole parameter."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        for _, weight in weights:
            parameters["embed.weight"][: len(weight)].copy_(weight)
            parameters["embed.weight"][len(weight) :].fill_(0)

    trace = traced({"embed.weight": (64, 4)}, load, tensor("embed", 50, 4))
    assert [copy.sources for copy in trace.copies] == [("embed",), ()]
    assert trace.covered_numel() == trace.parameter_numel
    assert trace.modules() == {"embed": ["embed"]}


def test_a_tied_parameter_that_is_loaded_twice_is_covered_once() -> None:
    """Embedding and head give the same place: equal copies must not hide a gap elsewhere."""
    trace = traced(
        {"m.w": (6, 4)}, into_w(lambda w: w), tensor("embed", 6, 4), tensor("head", 6, 4)
    )
    assert trace.covered_numel() == {"m.w": 24}
    assert trace.modules() == {"m": ["embed", "head"]}


def test_what_is_not_filled_shows_as_uncovered() -> None:
    """Half a parameter, and one that nothing reaches."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        for _, weight in weights:
            parameters["m.w"][:2].copy_(weight)

    trace = traced({"m.w": (4, 4), "m.bias": (4,)}, load, tensor("w", 2, 4), tensor("spare", 2, 4))
    assert trace.covered_numel() == {"m.w": 8, "m.bias": 0}
    assert trace.parameter_numel == {"m.w": 16, "m.bias": 4}


@pytest.mark.parametrize(
    "second",
    [
        lambda whole: whole[3:7],
        lambda whole: whole[:, 1:3].t(),
        lambda whole: whole.flatten()[14:30].view(4, 4),
    ],
)
def test_an_overlap_does_not_make_up_for_a_gap(
    second: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """As many elements are copied as the parameter has, some twice and some never."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        whole = parameters["m.w"]
        for name, weight in weights:
            (whole[:4] if name == "a" else second(whole)).copy_(weight)

    whole = torch.arange(32.0).view(8, 4)
    b = tensor("b", *second(whole).shape)
    trace = traced({"m.w": (8, 4)}, load, tensor("a", 4, 4), b)
    filled = set(whole[:4].flatten().tolist()) | set(second(whole).flatten().tolist())
    assert trace.covered_numel() == {"m.w": len(filled)}
    assert trace.filling() == {"m.w": (len(filled), 32)}
    assert not trace.fills_exactly()


def test_an_engine_may_say_that_a_checkpoint_fills_less_than_a_parameter_has() -> None:
    """Kernel padding that is neither loaded nor filled is noted on the parameter itself."""
    parameter = nn.Parameter(torch.empty(10, device="meta"))
    parameter.weight_loader_numel = 8  # type: ignore[attr-defined]

    def load(weights: Weights) -> None:
        for _, weight in weights:
            parameter.data[:8].copy_(weight)

    trace = trace_loader({"m.w": parameter}, load, [tensor("w", 8)])
    assert trace.covered_numel() == trace.parameter_numel == {"m.w": 8}


def test_a_loader_that_refuses_names_the_tensor_it_was_given() -> None:
    """By assertion, as engines do, or by torch, where a narrow or a copy does not fit."""

    def asserting(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        for name, weight in weights:
            assert weight.shape == (4, 4), f"bad shape for {name}"

    def narrowing(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        for _, weight in weights:
            parameters["m.w"].narrow(0, 0, weight.shape[0]).copy_(weight)

    for load in (asserting, narrowing, into_w(lambda w: w)):
        with pytest.raises(WeightMismatchError, match=r"^layers\.1\.w: .*\(5, 4\) of float32"):
            traced({"m.w": (4, 4)}, load, tensor("layers.0.w", 4, 4), tensor("layers.1.w", 5, 4))


def test_a_loader_that_fails_before_its_first_tensor_says_so() -> None:
    """Then no tensor is to blame."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        raise KeyError("no such layer")

    with pytest.raises(WeightMismatchError, match=r"before the first tensor: KeyError"):
        traced({"m.w": (4, 4)}, load, tensor("w", 4, 4))


def test_tensors_that_the_loader_skips_are_no_sources() -> None:
    """Rotary tables, other ranks' layers: seen, and put nowhere."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        for name, weight in weights:
            if name == "w":
                parameters["m.w"].copy_(weight)

    assert traced({"m.w": (4,)}, load, tensor("w", 4), tensor("inv_freq", 4)).sources() == {"w"}


def test_the_trace_takes_no_memory_of_the_size_of_the_model() -> None:
    """A terabyte of weights is traced on any machine."""
    trace = traced({"m.w": (1 << 20, 1 << 18)}, into_w(lambda w: w), tensor("w", 1 << 20, 1 << 18))
    assert trace.covered_numel() == {"m.w": 1 << 38}


def into_layers(change: Callable[[str, torch.Tensor], torch.Tensor]) -> LoaderTrace:
    """Trace a loader that puts what `change` makes of `l.0.w` and `l.1.w` into `m.0.w`, `m.1.w`."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        for name, weight in weights:
            parameters[name.replace("l", "m", 1)].copy_(change(name, weight))

    tensors = [tensor(f"l.{layer}.w", 4, 4) for layer in range(3)]
    return traced({f"m.{layer}.w": (4, 4) for layer in range(3)}, load, *tensors)


LATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "arithmetic": lambda w: w * 2,
    "arithmetic in place": lambda w: w.mul_(2),
    "arithmetic in place on a view": lambda w: (w.t()[1].zero_(), w)[1],
    "a gathered copy": lambda w: w[[3, 2, 1, 0]],
}


@pytest.mark.parametrize("change", LATE.values(), ids=LATE)
def test_a_layer_that_is_treated_otherwise_than_the_first_is_found(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Only layer 0 is followed at first; what layer 2 does makes all of them be followed."""
    trace = into_layers(lambda name, w: change(w) if "2" in name else w)
    assert [(copy.sources, copy.pure) for copy in trace.copies] == [
        (("l.0.w",), True),
        (("l.1.w",), True),
        (("l.2.w",), False),
    ]


def test_copies_that_are_not_called_by_name_are_found() -> None:
    """An assignment to a part copies below torch's Python methods."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        for name, weight in weights:
            parameters[name][:] = weight

    tensors = [tensor(f"l.{layer}.w", 4, 4) for layer in range(2)]
    trace = traced({f"l.{layer}.w": (4, 4) for layer in range(2)}, load, *tensors)
    assert trace.covered_numel() == trace.parameter_numel
    assert all(copy.pure for copy in trace.copies)


def test_torch_is_as_before_after_a_trace_and_after_a_refusal() -> None:
    """The copies are intercepted in torch's own class, for the length of the trace only."""

    def refuse(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        raise ValueError(next(iter(weights))[0])

    into_layers(lambda _, w: w)
    with pytest.raises(WeightMismatchError, match="w: the engine's loader refuses"):
        traced({"m.w": (4, 4)}, refuse, tensor("w", 4, 4))
    assert not {"copy_", "fill_", "zero_"} & set(vars(torch.Tensor))


def test_another_librarys_copies_are_its_own_again_after_a_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some patch torch's class for good; what they put there is put back."""

    def theirs(target: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return torch._C.TensorBase.copy_(target, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "copy_", theirs)
    into_layers(lambda _, w: w)
    assert vars(torch.Tensor)["copy_"] is theirs


def test_parameters_that_share_a_storage_are_told_apart_by_their_places() -> None:
    """Experts packed into one piece of memory, which the model keeps as a tensor of its own too."""
    packed = torch.empty(3, 4, 2, device="meta")
    parameters = {f"e.{n}.w": nn.Parameter(packed[n], requires_grad=False) for n in range(3)}

    def load(weights: Weights) -> None:
        for name, weight in weights:
            parameters[name].copy_(weight)

    trace = trace_loader(parameters, load, [tensor(f"e.{n}.w", 4, 2) for n in (0, 2)])
    assert trace.covered_numel() == {"e.0.w": 8, "e.1.w": 0, "e.2.w": 8}
    assert [(copy.sources, copy.offset) for copy in trace.copies] == [
        (("e.0.w",), 0),
        (("e.2.w",), 16),
    ]


def test_a_parameter_is_known_before_what_is_a_view_of_it() -> None:
    """A model may keep a part of a parameter, or all parts together, under a name of its own."""
    model = nn.Module()
    packed = torch.empty(2, 4, 2, device="meta")
    model.first = nn.Parameter(packed[0], requires_grad=False)
    model.second = nn.Parameter(packed[1], requires_grad=False)
    model.both, model.row = packed, packed[0][:1]

    def load(weights: Weights) -> None:
        for name, weight in weights:
            if name == "rows":
                for row, each in zip(packed[0], weight, strict=True):
                    row.copy_(each)
            else:
                model.get_parameter(name).copy_(weight)

    offered = [tensor("rows", 4, 2), tensor("second", 4, 2)]
    trace = trace_loader(ModelParameters(model), load, offered)
    assert trace.covered_numel() == {"first": 8, "second": 8}


def test_a_parameter_that_is_changed_after_its_copy_is_told_from_a_copy() -> None:
    """Its values are no longer the tensor's, though the copy itself was one."""

    def load(parameters: dict[str, torch.Tensor], weights: Weights) -> None:
        for name, weight in weights:
            parameters[name].copy_(weight)
            if "0" in name:
                parameters[name].add_(1)

    trace = traced(
        {f"l.{n}.w": (4, 4) for n in range(2)}, load, *(tensor(f"l.{n}.w", 4, 4) for n in range(2))
    )
    assert {(copy.parameter, copy.pure) for copy in trace.copies} == {
        ("l.0.w", True),
        ("l.0.w", False),
        ("l.1.w", True),
    }
    assert trace.covered_numel() == trace.parameter_numel
