"""Plain torch tensors as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.torch_source import hf_boxes
from tests.support.megatron_fixtures import read_safetensors

TINY = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return read_safetensors(folder / "model.safetensors")


def test_a_dense_model_is_published_as_it_is(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY, head_dim=4))
    rebuilt, expected = assemble(hf_boxes(model.named_parameters())), saved(model, tmp_path)
    assert sorted(rebuilt) == sorted(expected)
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in expected.items())


def test_both_names_of_a_tied_head_are_published() -> None:
    """Which of them the engine has is the engine's to say."""
    config = Qwen3Config(**TINY | {"tie_word_embeddings": True}, head_dim=4)
    model = AutoModelForCausalLM.from_config(config)
    addresses = {box.name: box.data.data_ptr() for box in hf_boxes(model.state_dict())}
    assert addresses["lm_head.weight"] == addresses["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    "view",
    [
        torch.randn(4, 6).t(),
        torch.randn(4, 12)[:, ::2],
        torch.randn(()),
        torch.randn(1).expand(1),
        nn.Parameter(torch.randn(3)),
        torch.randn(4).to(torch.float8_e4m3fn),
        torch.arange(4),
    ],
    ids=["transposed", "strided", "scalar", "one", "parameter", "float8", "int64"],
)
def test_any_strided_tensor_is_published_in_place(view: torch.Tensor) -> None:
    (box,) = hf_boxes({"w": view})
    assert (box.data.data_ptr(), box.data.stride()) == (view.data_ptr(), view.stride())
    assert not box.data.requires_grad
    assert torch.equal(assemble([box])["w"].double(), view.detach().double())


class Wrapped(torch.Tensor):
    """A class that computes its values, as quantized and distributed tensors do."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError


class Tagged(torch.Tensor):
    """A class that only adds attributes, as engines' and trainers' parameters do."""


def test_a_subclass_with_ordinary_memory_is_taken() -> None:
    (box,) = hf_boxes({"w": torch.ones(2).as_subclass(Tagged)})
    assert type(box.data) is torch.Tensor


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, device="meta"), "meta tensor"),
        (torch.zeros(3, 1).expand(3, 2), "expanded"),
        (torch.zeros(2, dtype=torch.complex64).conj().imag, "negated"),
        (nn.UninitializedParameter(), "uninitialized"),
        ([1.0, 2.0], "a list is not a tensor"),
    ],
    ids=["meta", "expanded", "negated", "lazy", "list"],
)
def test_a_tensor_without_memory_of_its_own_is_an_error(tensor: Any, message: str) -> None:
    with pytest.raises(SourceError, match=f"^w: .*{message}"):
        hf_boxes({"w": tensor})


def test_freed_storage_is_an_error() -> None:
    """FSDP1 frees the storage of a parameter that is not summoned."""
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(SourceError, match="storage has been freed"):
        hf_boxes({"w": tensor})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 2).to_sparse(), "sparse_coo"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.Tensor._make_subclass(Wrapped, torch.zeros(2)), "Wrapped"),
    ],
    ids=["sparse", "complex", "wrapped"],
)
def test_what_cannot_be_moved_as_bytes_is_unsupported(tensor: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^w: .*{message}"):
        hf_boxes({"w": tensor})


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_must_be_text(name: Any) -> None:
    with pytest.raises(SourceError, match="name is"):
        hf_boxes([(name, torch.zeros(1))])


def test_a_name_given_twice_is_an_error() -> None:
    with pytest.raises(SourceError, match="w: given twice"):
        hf_boxes([("w", torch.zeros(1)), ("w", torch.zeros(1))])
