"""A checkpoint that has a head of its own beside a config that ties it to the embedding.

Tools that fine-tune write such; vLLM looks whether the two are equal, and ties them after its load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_plugins.errors import WeightMismatchError
from tests.families.catalogue import family_named
from tests.families.maker import random_model, save
from tests.families.tensors import differences, tensors_of
from tests.support.loader_maps import PlayedEngine, load_through, played_engine, receiving, update
from tests.support.source_ranks import offered_tensors
from vllm_ext.tied_head import config_facts

Tensors = Mapping[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def checkpoint(folder: Path, head: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A tied model, saved with a head of its own: the embedding, or another."""
    family = family_named("qwen2-tied")
    save(random_model(family, seed=0, dtype=torch.float32), family, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone() if head is None else head
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@contextmanager
def loaded(engine: PlayedEngine, folder: Path, values: Tensors) -> Iterator[Any]:
    """The installer of a rank that has loaded values as vLLM does, and its model."""
    with engine.rank(folder, tp_size=1, tp_rank=0) as rank:
        config = rank.config.model_config  # type: ignore[attr-defined]
        config.maybe_untie_word_embeddings()
        assert config_facts(config) == {"tie_word_embeddings": True}
        live = rank.model()
        load_through(live, dict(values))
        yield rank.installer(live), live


@pytest.mark.parametrize("both", [False, True], ids=["parameters", "state_dict"])
def test_a_head_that_is_the_embedding_comes_with_it(both: bool, tmp_path: Path) -> None:
    """A trainer's `named_parameters()` have it once, its `state_dict()` twice."""
    values = checkpoint(tmp_path / "model", None)
    offered = {name: each.clone() for name, each in values.items() if both or name != HEAD}
    with played_engine() as engine:
        with loaded(engine, tmp_path / "model", values) as (_, model):
            fresh = tensors_of(model)
        before = {name: each.flip(0) for name, each in values.items()}
        with (
            loaded(engine, tmp_path / "model", before) as (installer, live),
            offered_tensors(offered) as trainer,
            receiving(installer) as receiver,
        ):
            for _ in range(3):
                update(receiver, [trainer])
            assert differences(tensors_of(live), fresh) == []


def test_a_head_that_is_another_has_to_be_sent(tmp_path: Path) -> None:
    values = checkpoint(tmp_path / "model", torch.randn(256, 64))
    without = {name: each for name, each in values.items() if name != HEAD}
    with (
        played_engine() as engine,
        loaded(engine, tmp_path / "model", values) as (installer, _),
        receiving(installer) as receiver,
    ):
        with (
            offered_tensors(without) as trainer,
            pytest.raises(WeightMismatchError, match=r"lm_head\.weight .*both names"),
        ):
            update(receiver, [trainer])
        with offered_tensors(dict(values)) as trainer:
            update(receiver, [trainer])
