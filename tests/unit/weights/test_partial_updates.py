"""Parts of a model into an engine's own loader: what is left out stays, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_plugins.errors import WeightMismatchError
from engine_plugins.weights.sources.hf_offer import HfOffer
from engine_plugins.weights.sources.only import Only
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.families.catalogue import family_named
from tests.families.engines import LOADED_RANKS, LoadedSglang, LoadedVllm
from tests.families.maker import become, random_model, save
from tests.families.tensors import differences, tensors_of
from tests.support.loader_maps import PlayedEngine, played_engine, receiving, update
from tests.support.source_ranks import SourceRank

pytestmark = pytest.mark.loader

FAMILY = family_named("qwen3-moe")
LAYER = "model.layers.1."
Loaded = LoadedVllm | LoadedSglang


def model(seed: int) -> Any:
    return random_model(FAMILY, seed=seed, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine() -> Iterator[PlayedEngine]:
    with played_engine() as played:
        yield played


def loaded(engine: PlayedEngine, folder: Path, stack: ExitStack) -> Loaded:
    rank = stack.enter_context(engine.rank(folder, tp_size=1, tp_rank=0, dtype="float32"))
    return LOADED_RANKS[engine.kind](rank)


def held(loaded: Loaded) -> dict[str, torch.Tensor]:
    return {**tensors_of(loaded.model), **loaded.computed()}


def part_of(trained: Any, patterns: list[str], stack: ExitStack) -> SourceRank:
    transport = InMemoryTransport(f"part-{id(stack)}")
    stack.callback(transport.close)
    boxes = HfOffer(trained, only=Only(patterns)).boxes
    source = WeightSource(boxes, transport, partial=True)
    stack.callback(source.close)
    return SourceRank(transport=transport, source=source)


def test_what_is_left_out_stays_and_what_is_sent_is_new(
    engine: PlayedEngine, tmp_path: Path
) -> None:
    """Compared with a load of a checkpoint that has the new values in that part alone."""
    before, after = model(0).state_dict(), model(1).state_dict()
    sent = [f"{LAYER}*", "lm_head.weight"]
    mixed = {
        name: (after if name.startswith(LAYER) or name == "lm_head.weight" else before)[name]
        for name in before
    }
    trained = model(0)
    folders = [save(trained, FAMILY, tmp_path / "before")]
    become(trained, mixed)
    folders.append(save(trained, FAMILY, tmp_path / "mixed"))
    with ExitStack() as stack:
        wanted = held(loaded(engine, folders[1], stack))
    become(trained, after)
    with ExitStack() as stack:
        live = loaded(engine, folders[0], stack)
        receiver = stack.enter_context(receiving(live.installer()))
        for _ in range(2):
            update(receiver, [part_of(trained, sent, stack)])
            assert differences(held(live), wanted) == []


@pytest.mark.parametrize("left", ["self_attn.v_proj.weight", "mlp.experts.2.up_proj.weight"])
def test_a_part_of_what_the_engine_holds_as_one_is_refused(
    engine: PlayedEngine, left: str, tmp_path: Path
) -> None:
    """With the names that would have to go too."""
    trained = model(0)
    offer = HfOffer(trained).boxes()
    sent = [box.name for box in offer if box.name.startswith(LAYER) and not box.name.endswith(left)]
    with ExitStack() as stack:
        live = loaded(engine, save(trained, FAMILY, tmp_path / "before"), stack)
        receiver = stack.enter_context(receiving(live.installer()))
        with pytest.raises(WeightMismatchError) as raised:
            update(receiver, [part_of(trained, sent, stack)])
    assert left.partition(".")[0] in str(raised.value)
    assert "only=" in raised.value.remedy
