"""A head of its own under a tied config is refused; a copy of the embedding is not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.sources.megatron.rank import MegatronChunk, MegatronRank
from engine_plugins.weights.sources.megatron.source import megatron_boxes, megatron_boxes_of
from engine_plugins.weights.sources.megatron.tied_heads import checked_boxes, is_tied
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.megatron_hf import dense_config

CONFIG = dense_config("llama", num_hidden_layers=1, tie_word_embeddings=True)
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def rows(value: float) -> torch.Tensor:
    return torch.full((CONFIG["vocab_size"], CONFIG["hidden_size"]), value)


def rank(pp_rank: int = 0, pp_size: int = 1, /, **chunk: Any) -> MegatronRank:
    return MegatronRank(
        chunks=[MegatronChunk(global_layers=[], **chunk)],
        tp_rank=0,
        tp_size=1,
        pp_rank=pp_rank,
        pp_size=pp_size,
    )


def names(ranks: list[MegatronRank]) -> list[str]:
    return [box.name for box in megatron_boxes_of(ranks, CONFIG)]


def test_a_head_beside_its_embedding_is_refused() -> None:
    """Untied in training, tied in the HF config: the engine would never see the head."""
    with pytest.raises(SourceError, match=r"output_layer\.weight has values of its own") as caught:
        megatron_boxes(rank(tensors={EMBEDDING: rows(0), HEAD: rows(1)}), CONFIG)
    assert "set tie_word_embeddings to false" in caught.value.remedy


@pytest.mark.parametrize("head", [rows(0), rows(torch.nan)])
def test_a_copy_is_left_out(head: torch.Tensor) -> None:
    own = rank(tensors={EMBEDDING: rows(0), HEAD: head})
    assert names([own]) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(("shared", "value"), [(True, 1.0), (False, 0.0)])
def test_the_last_stages_module_says_whether_its_head_is_a_copy(shared: bool, value: float) -> None:
    """It knows; values that are equal before the first step prove nothing."""
    module = nn.Module()
    module.share_embeddings_and_output_weights = shared  # type: ignore[assignment]
    last = rank(1, 2, tensors={HEAD: rows(value)}, module=nn.Sequential(module))
    if shared:
        assert names([last]) == []
    else:
        with pytest.raises(SourceError, match="values of its own"):
            names([last])


def test_stages_of_one_process_are_compared() -> None:
    first = rank(0, 2, tensors={"module." + EMBEDDING: rows(0)})
    assert names([first, rank(1, 2, tensors={HEAD: rows(0)})]) == ["model.embed_tokens.weight"]
    with pytest.raises(SourceError, match="values of its own"):
        names([first, rank(1, 2, tensors={HEAD: rows(1)})])


def hf(head: torch.Tensor, embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": head}


def test_an_hf_head_of_its_own_is_refused_where_the_config_ties_it() -> None:
    boxes = hf_boxes(hf(rows(1), rows(0)))
    assert checked_boxes(boxes, tied=False) == boxes
    with pytest.raises(SourceError, match=r"lm_head\.weight has values of its own"):
        checked_boxes(boxes, tied=True)
    copies = hf_boxes(hf(rows(1), rows(1)))
    assert checked_boxes(copies, tied=True) == copies


@pytest.mark.parametrize("way", [WeightSender.from_hf, WeightSender.from_fsdp])
def test_a_sender_of_a_model_looks_at_its_head(way: Any) -> None:
    """Trained untied, under a config that is still that of the tied checkpoint."""
    model = nn.Module()
    model.config = {"tie_word_embeddings": True}  # type: ignore[assignment]
    model.embed_tokens = nn.Embedding(4, 2)
    model.lm_head = nn.Linear(2, 4, bias=False)
    agent = InMemoryTransport("trainer")
    offer = partial(way, model, engines="http://127.0.0.1:1", token="t", transport=agent)
    with pytest.raises(SourceError, match=r"lm_head\.weight has values of its own"):
        offer()
    model.lm_head.weight = model.embed_tokens.weight
    offer().close()
    agent.close()


def test_the_models_own_config_counts_where_none_is_given() -> None:
    model = nn.Module()
    model.config = {"text_config": {"tie_word_embeddings": True}}  # type: ignore[assignment]
    assert is_tied(None, model)
    assert not is_tied({"tie_word_embeddings": False}, model)
    assert not is_tied(None, {})
