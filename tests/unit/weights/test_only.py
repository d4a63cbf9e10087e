"""Which tensors `only=` sends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.weights.sources.hf_offer import HfOffer
from engine_plugins.weights.sources.only import Only
from engine_plugins.weights.sources.torch_source import hf_boxes

TENSORS = {name: torch.ones(1) for name in ("model.a.weight", "model.a.bias", "lm_head.weight")}


def test_a_tensor_is_sent_that_any_pattern_matches() -> None:
    boxes = Only(["model.*.bias", "lm_head.weight"]).of(hf_boxes(TENSORS))
    assert [box.name for box in boxes] == ["model.a.bias", "lm_head.weight"]
    assert [box.name for box in HfOffer(TENSORS, only=Only("*.weight")).boxes()] == [
        "model.a.weight",
        "lm_head.weight",
    ]


def test_a_pattern_that_matches_on_no_rank_is_an_error() -> None:
    only, boxes = Only(["model.*", "visual.*"]), hf_boxes(TENSORS)
    assert only.idle(boxes) == ["visual.*"]
    only.refuse_idle([["visual.*"], ["model.*"]])
    with pytest.raises(SourceError, match=r"only=\['visual\.\*'\] matches no tensor"):
        only.refuse_idle([["visual.*"], ["model.*", "visual.*"]])


@pytest.mark.parametrize("patterns", [[], [7]])
def test_no_pattern_is_an_error(patterns: list[str]) -> None:
    with pytest.raises(SourceError, match="chooses nothing"):
        Only(patterns)


def test_what_lies_beside_the_model_may_be_left_out() -> None:
    class ValueHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v_head = nn.Linear(2, 1)

    boxes = HfOffer(nn.ModuleDict({"model": nn.Linear(2, 2), "head": ValueHead()})).boxes()
    chosen = Only("model.*").of(boxes)
    assert [box.name for box in chosen] == ["model.weight", "model.bias"]
