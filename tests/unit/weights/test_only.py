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
    only = Only(["model.*", "visual.*"])
    assert only.idle(TENSORS.keys()) == ["visual.*"]
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


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("chosen", [[EMBED], [EMBED, HEAD], ["*"]])
def test_a_tied_head_of_its_own_is_seen_whatever_is_chosen_of_the_two(chosen: list[str]) -> None:
    """Engines compute with the embedding in its place; what leaves out both changes neither."""
    pair = {EMBED: torch.ones(2, 3), HEAD: torch.ones(2, 3), "model.a.weight": torch.ones(1)}
    config = {"tie_word_embeddings": True}
    offer, other = (HfOffer(pair, config, only=Only(each)) for each in (chosen, "model.a.*"))
    assert offer.boxes() is offer.boxes()
    pair[HEAD].mul_(2)
    with pytest.raises(SourceError, match=r"lm_head\.weight has values of its own"):
        offer.boxes()
    assert [box.name for box in other.boxes()] == ["model.a.weight"]


def test_a_tied_head_is_not_chosen_without_its_embedding() -> None:
    """Engines drop it: an update would say that it was installed, and nothing would have been."""
    pair = {EMBED: torch.ones(2, 3), HEAD: torch.ones(2, 3)}
    offer = HfOffer(pair, {"tie_word_embeddings": True}, only=Only(HEAD))
    with pytest.raises(SourceError, match="without the embedding"):
        offer.boxes()
