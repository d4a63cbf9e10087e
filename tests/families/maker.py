"""Checkpoints of the catalogue's models, as Hugging Face's hub has them, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.families.family import BASE, Family

__all__ = ["become", "checkpoint", "random_model", "save"]


def random_model(family: Family, *, seed: int, dtype: torch.dtype) -> Any:
    """A transformers model with random values in everything that its checkpoint holds.

    No two tensors are alike and none is constant, norms and loaded buffers included: a value that
    an update loses or leaves behind differs from the right one.
    """
    import transformers

    options = {key: value for key, value in {**BASE, **family.options}.items() if value is not None}
    options.setdefault("pad_token_id", None)
    config = getattr(transformers, family.config)(**options)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                centre = 1.0 if "norm" in name and tensor.ndim == 1 else 0.0
                tensor.copy_(torch.randn(tensor.shape) * 0.2 + centre)
    model.config.architectures = [type(model).__name__]
    return model.to(dtype)


@torch.no_grad()
def become(trained: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Have a model hold another one's values, its state dict, in the memory that it has."""
    for name, tensor in trained.state_dict().items():
        tensor.copy_(values[name])


def save(model: Any, family: Family, folder: Path) -> Path:
    """Write a model as a checkpoint of the hub: its names, its splits, its config."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **family.published}))
    return folder


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
