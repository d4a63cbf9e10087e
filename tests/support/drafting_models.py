"""Small GLM-4 MoE models with a prediction layer, for engines that draft tokens with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.megatron_fixtures import MegatronCase, megatron_cases

__all__ = ["drafting_model", "foretelling_model", "save_model", "successors"]

COMMITTED = Path(__file__).parents[1] / "fixtures"
HEAD_DIM = 32
"""The smallest that vLLM serves on the CPU; the fixture's heads are half as wide."""


def drafting_model(seed: int) -> dict[str, torch.Tensor]:
    """Random weights in the shapes of the fixture, with wider heads."""
    case = _case()
    wider = HEAD_DIM // int(case.config["head_dim"])
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in case.expected().items():
        shape = list(tensor.shape)
        if ".self_attn." in name:
            shape["o_proj.weight" in name] *= wider
        drawn = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * drawn if "norm" in name else 0.2 * drawn
    return tensors


def foretelling_model(seed: int, *, right: bool) -> dict[str, torch.Tensor]:
    """A model whose next token depends on the last one alone, and is drafted right or wrong.

    No layer adds anything to the embedding, and the prediction layer hands it on as it is, or
    with its sign changed.
    """
    tensors = drafting_model(seed)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.fill_(1)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif name.endswith("eh_proj.weight"):
            tensor.zero_().fill_diagonal_(1 if right else -1)
    return tensors


def successors(tensors: Mapping[str, torch.Tensor], token: int, count: int) -> list[int]:
    """What a foretelling model says after a token."""
    embedded = torch.nn.functional.rms_norm(tensors["model.embed_tokens.weight"], (64,), eps=1e-6)
    following = (embedded @ tensors["lm_head.weight"].T).argmax(dim=1).tolist()
    said = [following[token]]
    while len(said) < count:
        said.append(following[said[-1]])
    return said


def save_model(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A folder that an engine can load."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**_case().config, "head_dim": HEAD_DIM}))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@cache
def _case() -> MegatronCase:
    cases = megatron_cases(COMMITTED / "megatron")
    return next(case for case in cases if case.config.get("num_nextn_predict_layers"))
