"""Which dtype a tensor should come in: its parameter's, or the engine's own of several."""

from __future__ import annotations

import pytest
import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.dtype_fit import dtype_problems, wanted_dtypes
from engine_plugins.weights.loader.loader_trace import LoaderTrace, TracedCopy

BF16, F32, F16, F8 = torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn


def trace_of(*copies: tuple[str, str, torch.dtype, torch.dtype]) -> LoaderTrace:
    """Copies of one element: tensors joined by `+`, parameter, dtype that is copied and held."""
    made = tuple(
        TracedCopy(
            sources=tuple(sources.split("+")),
            parameter=parameter,
            offset=0,
            shape=(1,),
            strides=(1,),
            source_dtype=source,
            parameter_dtype=held,
            pure=source == held,
        )
        for sources, parameter, source, held in copies
    )
    known = {copy.parameter: 1 for copy in made if not copy.parameter.startswith("derived")}
    return LoaderTrace(copies=made, parameter_numel=known)


def offered(**dtypes: torch.dtype) -> list[LogicalTensor]:
    return [LogicalTensor(name=name, shape=(1,), dtype=each) for name, each in dtypes.items()]


def test_each_tensor_is_wanted_in_its_parameters_dtype() -> None:
    """A float32 trainer and a bfloat16 engine with a router in float32."""
    trace = trace_of(("w", "m.w", F32, BF16), ("router", "m.router", F32, F32))
    tensors = offered(w=F32, router=F32)
    assert wanted_dtypes(trace, tensors, BF16) == {"w": BF16}
    assert dtype_problems(trace, BF16) == ["w is float32, m.w wants bfloat16"]
    assert dtype_problems(trace, BF16, mended={"w"}) == []


def test_what_the_engine_casts_of_its_own_checkpoint_is_left_alone() -> None:
    trace = trace_of(("router", "m.router", BF16, F32), ("w", "derived.w", F32, BF16))
    assert wanted_dtypes(trace, offered(router=BF16, w=F32), BF16) == {}
    assert dtype_problems(trace, BF16) == []


def test_a_float32_bias_that_the_engine_holds_in_its_own_dtype_may_be_sent_so() -> None:
    """As SGLang's Ernie 4.5 holds the router's, of a checkpoint that has float32."""
    trace = trace_of(("bias", "m.bias", F32, BF16), ("w", "m.w", BF16, BF16))
    assert wanted_dtypes(trace, offered(bias=F32, w=BF16), BF16) == {"bias": BF16}


def test_a_tensor_of_two_parameters_goes_in_the_engines_own_dtype() -> None:
    """A tied head in float32: its loader casts the one of the two that is not."""
    trace = trace_of(("e", "embed.w", F32, BF16), ("e", "head.w", F32, F32))
    assert wanted_dtypes(trace, offered(e=F32), BF16) == {"e": BF16}


def test_all_tensors_that_a_loader_joins_are_wanted() -> None:
    trace = trace_of(("q+k", "m.qk", F32, BF16))
    assert wanted_dtypes(trace, offered(q=F32, k=F32), BF16) == {"q": BF16, "k": BF16}


@pytest.mark.parametrize(("held", "wanted"), [(F32, F8), (F8, BF16), (torch.int64, F32)])
def test_no_cast_makes_values_of_bytes(held: torch.dtype, wanted: torch.dtype) -> None:
    """It stays what it is: tensors that do not fit."""
    trace = trace_of(("w", "m.w", held, wanted))
    assert wanted_dtypes(trace, offered(w=held), F16) == {}
    assert len(dtype_problems(trace, F16)) == 1


def test_a_tensor_that_comes_as_it_should_is_not_asked_for_again() -> None:
    """The loader computes in another dtype before it copies: no cast of the sender's helps."""
    trace = trace_of(("w", "m.w", F32, F16))
    assert wanted_dtypes(trace, offered(w=F16), BF16) == {}
    assert len(dtype_problems(trace, BF16)) == 1
