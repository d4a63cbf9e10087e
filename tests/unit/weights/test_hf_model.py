"""A transformers model under its checkpoint's names, family by family, whole and in shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.core_model_loading import PermuteForRope, WeightConverter

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.boxes.placement import SourceBox, assemble
from engine_plugins.weights.sources.fsdp_source import fsdp_tensors
from engine_plugins.weights.sources.hf_model import (
    CheckpointNames,
    names_of_config,
    names_of_model,
)
from engine_plugins.weights.sources.hf_offer import HfOffer
from engine_plugins.weights.sources.only import Only
from engine_plugins.weights.sources.torch_source import hf_boxes
from tests.families.catalogue import FAMILIES, family_named
from tests.families.family import Family
from tests.families.maker import checkpoint, random_model, save

RENAMED = ("mixtral", "granite-moe", "gpt-oss", "ernie4.5-moe", "qwen3-next", "hy-v3", "llama4")
"""Renamed modules, experts joined in the checkpoint and not, axes swapped."""


def made(name: str) -> tuple[Family, Any]:
    family = family_named(name)
    return family, random_model(family, seed=0, dtype=torch.float32)


def saved(model: Any, family: Family, folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint(save(model, family, folder / "saved"))


def assert_equal(boxes: Sequence[SourceBox], expected: dict[str, torch.Tensor]) -> None:
    rebuilt = assemble(boxes)
    assert sorted(rebuilt) == sorted(expected)
    assert [name for name in expected if not torch.equal(rebuilt[name], expected[name])] == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_model_is_offered_as_it_would_be_saved(name: str, tmp_path: Path) -> None:
    """Names and bits equal what `save_pretrained` writes, and no value is copied."""
    family, model = made(name)
    boxes = HfOffer(model).boxes()
    assert_equal(boxes, saved(model, family, tmp_path))
    storages = {tensor.untyped_storage().data_ptr() for _, tensor in fsdp_tensors(model)}
    assert {box.data.untyped_storage().data_ptr() for box in boxes} <= storages


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_share_of_a_tensor_becomes_shares_of_what_it_is_saved_as(
    name: str, axis: int, tmp_path: Path
) -> None:
    """As FSDP cuts, unevenly, or along a second axis, as tensor parallelism may."""
    family, model = made(name)
    names, _ = names_of_model(model)
    assert names is not None
    parts = [list(shares(model, axis, part)) for part in range(3)]
    boxes = [box for own in parts for box in names.boxes(own)]
    assert_equal(boxes, saved(model, family, tmp_path))


def shares(model: nn.Module, axis: int, part: int) -> Iterator[SourceBox]:
    for name, tensor in fsdp_tensors(model):
        along = min(axis, tensor.ndim - 1)
        cut = -(-tensor.shape[along] // 3) * part
        size = min(-(-tensor.shape[along] // 3), max(tensor.shape[along] - cut, 0))
        start = [0] * tensor.ndim
        start[along] = min(cut, tensor.shape[along])
        data = tensor.detach().narrow(along, start[along], size)
        yield SourceBox(name=name, global_shape=tuple(tensor.shape), start=tuple(start), data=data)


@pytest.mark.parametrize("name", [*RENAMED, "llama", "deepseek-v2", "glm4-moe-lite"])
def test_named_tensors_with_a_config_are_offered_as_the_model_is(name: str, tmp_path: Path) -> None:
    """In the model's names, or in the checkpoint's, which stay as they are."""
    family, model = made(name)
    expected = saved(model, family, tmp_path)
    for config in (model.config, model.config.to_dict()):
        assert_equal(HfOffer(model.state_dict(), config).boxes(), expected)
        assert_equal(HfOffer(expected, config).boxes(), expected)
    assert_equal(HfOffer(expected, tmp_path / "saved").boxes(), expected)


def test_a_loaded_model_is_offered_under_the_names_that_it_was_loaded_by(tmp_path: Path) -> None:
    """In whatever format its checkpoint was: engines read the family's."""
    family, model = made("mixtral")
    expected = saved(model, family, tmp_path)
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    for folder in (tmp_path / "saved", tmp_path / "own"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert_equal(HfOffer(loaded).boxes(), expected)


def layers_compiled(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def test_what_is_wrapped_is_offered_as_what_is_not(tmp_path: Path) -> None:
    """Whole models and layers; of named tensors too."""
    family, model = made("mixtral")
    expected = saved(model, family, tmp_path)
    wraps: list[Callable[[Any], Any]] = [torch.compile, nn.DataParallel, layers_compiled]
    for wrap in wraps:
        wrapped = wrap(model)
        assert_equal(HfOffer(wrapped).boxes(), expected)
        assert_equal(HfOffer(wrapped.state_dict(), model.config).boxes(), expected)


class Beside(nn.Module):
    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        self.pretrained_model = model
        self.add_module(head, nn.Linear(2, 1))


def test_what_lies_beside_the_model_is_refused_with_where_the_model_is() -> None:
    """Or left out, where that is said."""
    _, model = made("llama")
    with pytest.raises(SourceError, match=r"scorer\.weight.*'pretrained_model'"):
        HfOffer(Beside(model, "scorer")).boxes()
    with pytest.raises(SourceError, match=r"v_head\.weight.*a value head") as raised:
        HfOffer(Beside(model, "v_head")).boxes()
    assert "pretrained_model" in raised.value.remedy
    chosen = HfOffer(Beside(model, "v_head"), only=Only("*")).boxes()
    assert [box.name for box in chosen] == [box.name for box in HfOffer(model).boxes()]
    both = nn.ModuleList([model, made("llama")[1]])
    with pytest.raises(SourceError, match="several models: 0, 1"):
        HfOffer(both)


def test_an_engines_words_are_told_in_the_models_names() -> None:
    _, model = made("mixtral")
    offer = HfOffer(model)
    offer.boxes()
    prefix = "model.layers.0"
    gate = f"{prefix}.block_sparse_moe.gate.weight"
    text = f"{gate}: the loader refuses it; {prefix}.input_layernorm.weight missing"
    assert offer.in_own_words(text) == f"{gate} is the model's {prefix}.mlp.gate.weight"
    assert "give from_hf the model itself" in HfOffer(model.state_dict()).in_own_words(text)


def test_a_config_that_transformers_does_not_know_says_nothing() -> None:
    assert names_of_config({"model_type": "of_nobody"}) is None
    assert names_of_config(None) is None


def test_what_is_held_in_another_order_is_refused() -> None:
    """Rotary halves of a checkpoint in Meta's order, say: no view of the memory gives them."""
    config, model = transformers.LlamaConfig(num_attention_heads=2), nn.Linear(8, 8)
    swap = PermuteForRope(permute_layer_names=["weight"])
    convert = WeightConverter("weight", "weight", operations=[swap])
    names = CheckpointNames(lambda: [convert], config)
    with pytest.raises(UnsupportedError, match="weight: transformers holds them in another order"):
        names.boxes(hf_boxes(model.named_parameters()))
