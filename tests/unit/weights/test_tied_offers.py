"""State dicts of tied models have a head that some engines' loaders do not know."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.loader.coverage import engine_steps
from engine_plugins.weights.sources.hf_offer import HfOffer
from tests.families.catalogue import family_named
from tests.families.family import ENGINES
from tests.families.maker import random_model, save
from tests.support.loader_maps import logical, played_engine

pytestmark = pytest.mark.loader


KIND = next((kind for kind in ENGINES if find_spec(kind) is not None), "")
TIED = [name for name in ("gemma2", "bloom", "qwen3-tied") if KIND in family_named(name).engines]


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_may_be_given_whatever_the_loader_has(name: str, tmp_path: Path) -> None:
    """Gemma 2 and BLOOM of vLLM have no such module, and refused the tensor."""
    family = family_named(name)
    model = random_model(family, seed=0, dtype=torch.float32)
    assert "lm_head.weight" in model.state_dict()
    tensors = logical(assemble(HfOffer(model.state_dict()).boxes()))
    with played_engine() as engine:
        folder = save(model, family, tmp_path / "model")
        with engine.rank(folder, tp_size=1, tp_rank=0) as rank:
            trace = rank.trace(tensors)
            _, unused = engine_steps(trace, tensors, rank.rules)
    assert unused == []
    assert "lm_head.weight" not in trace.sources()
