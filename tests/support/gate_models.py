"""Models whose prefills take memory that can be measured, and servers pinned to show it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

__all__ = ["DENSE", "MOE", "PINNED_ALLOCATOR", "QUICK", "GateModel", "save_tokenizer"]

PINNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""glibc then returns what is freed, and a step's transients show in resident memory every time."""


@dataclass(frozen=True)
class GateModel:
    """A Qwen3 of random weights: small, with a large vocabulary and a long context."""

    moe: bool = False
    hidden: int = 512
    vocab: int = 32_768
    context: int = 8192

    def copy_to(self, folder: Path) -> Path:
        """A folder that an engine can load."""
        torch.manual_seed(0)
        _made(self).float().eval().save_pretrained(folder)
        return folder


def _made(model: GateModel) -> Any:
    from transformers import (
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    sizes: dict[str, Any] = {
        "hidden_size": model.hidden,
        "intermediate_size": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.context,
        "tie_word_embeddings": True,
    }
    if not model.moe:
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1024,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))


DENSE, MOE = GateModel(), GateModel(moe=True)
QUICK = GateModel(hidden=256)
"""For thousands of requests."""


def save_tokenizer(folder: Path, model: GateModel) -> Path:
    """A tokenizer for which one word, `w1` say, is one token; chats are their words alone."""
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(model.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2")
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    made.save_pretrained(folder)
    return folder
