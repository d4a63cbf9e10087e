"""What the judge of `make families` looks at, and how its list and its page are made."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.families.catalogue import FAMILIES, cases_of
from tests.families.family import ENGINES, LIVE
from tests.families.judge import EQUAL, NOT_HERE, REFUSED, Verdict
from tests.families.table import document
from tests.families.tensors import differences, tensors_of

pytestmark = pytest.mark.core


def _in_a_list(module: nn.Module, tensor: torch.Tensor) -> None:
    module.kept = [None, {"deep": (tensor,)}]  # type: ignore[assignment]


def _in_a_buffer(module: nn.Module, tensor: torch.Tensor) -> None:
    module.register_buffer("kept", tensor, persistent=False)


def _in_a_closure(module: nn.Module, tensor: torch.Tensor) -> None:
    module.kept = lambda x: x @ tensor  # type: ignore[assignment]


def _in_a_partial(module: nn.Module, tensor: torch.Tensor) -> None:
    module.kept = functools.partial(torch.mul, other=tensor)  # type: ignore[assignment]


def _in_an_attribute(module: nn.Module, tensor: torch.Tensor) -> None:
    module.kept = tensor


@pytest.mark.parametrize(
    "place", [_in_a_list, _in_a_buffer, _in_a_closure, _in_a_partial, _in_an_attribute]
)
def test_a_tensor_differs_wherever_a_module_keeps_it(
    place: Callable[[nn.Module, torch.Tensor], None],
) -> None:
    live, fresh = (nn.Sequential(nn.Linear(2, 2), nn.Identity()) for _ in range(2))
    fresh.load_state_dict(live.state_dict())
    place(live[1], torch.tensor([1.0, 2.0]))
    place(fresh[1], torch.tensor([1.0, 2.0]))
    assert differences(tensors_of(live), tensors_of(fresh)) == []
    place(fresh[1], torch.tensor([1.0, 2.5]))
    assert [
        path.partition(".")[0] for path in differences(tensors_of(live), tensors_of(fresh))
    ] == ["1"]


def test_a_tensor_that_is_gone_or_of_another_dtype_differs() -> None:
    one = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert differences({"a": torch.zeros(2, dtype=torch.int32)}, one) == ["a", "b"]


@pytest.mark.parametrize("kind", ENGINES)
def test_the_list_is_long_enough_and_of_every_kind(kind: str) -> None:
    ways = [case.way for case in cases_of(kind)]
    assert ways.count("float32") >= 40
    assert ways.count("bfloat16") >= 10
    assert ways.count(LIVE) >= 10
    kinds = " ".join(case.family.kind for case in cases_of(kind))
    for wanted in ("dense", "MoE", "tied", "MLA", "mamba", "linear", "biases", "fused", "Gemma"):
        assert wanted in kinds
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_the_page_gives_every_reason() -> None:
    verdicts = {
        "llama-float32": Verdict(result=EQUAL, bytes_moved=4, direct_bytes=1),
        "mistral-float32": Verdict(result=REFUSED, why="a `bias`\nreaches nothing"),
        "phi-float32": Verdict(result=NOT_HERE, why="no kernel"),
    }
    page = document({"vllm": verdicts}, {"vllm": "0.1"})
    assert "2 models judged in float32: 1 equal, 1 not here, 1 refused." in page
    assert "| llama | dense | equal (25 %) |" in page
    assert "1. mistral, float32: `a 'bias' reaches nothing`" in page
    assert "| phi | biases | *not here* [2] |" in page
