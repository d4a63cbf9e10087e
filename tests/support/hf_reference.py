"""What Hugging Face transformers says: greedy tokens in float32, the reference for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


@lru_cache(maxsize=8)
def reference_model(folder: Path) -> Any:
    """The model of a folder, in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    # On models as small as these, threads only wait for each other, and for a busy server.
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """The next `tokens` greedy ids after a prompt; never stops early."""
    return continue_greedy(model, None, prompt, tokens)


@torch.no_grad()
def cache_of(model: Any, tokens: Sequence[int]) -> Any:
    """The KV cache that a model computes for some tokens."""
    return model(torch.tensor([list(tokens)]), use_cache=True).past_key_values


@torch.no_grad()
def continue_greedy(model: Any, cache: Any, fed: Sequence[int], tokens: int) -> list[int]:
    """Greedy ids after feeding `fed` on top of a cache, which may be another model's."""
    out = model(torch.tensor([list(fed)]), past_key_values=cache, use_cache=True)
    ids: list[int] = []
    for _ in range(tokens):
        ids.append(int(out.logits[0, -1].argmax()))
        out = model(torch.tensor([[ids[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return ids
