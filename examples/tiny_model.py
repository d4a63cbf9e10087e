"""A Qwen3 that is small enough to train and serve on two CPU cores, with its tokenizer.

`python examples/tiny_model.py FOLDER` writes both as a Hugging Face checkpoint.
"""

from __future__ import annotations

import string
import sys
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

__all__ = ["character_tokenizer", "tiny_qwen3"]

END = "<end>"
UNKNOWN = "<unknown>"
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def character_tokenizer() -> Any:
    """A tokenizer with one token per ASCII character: whatever the model says can be printed."""
    vocabulary = {token: index for index, token in enumerate([END, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def tiny_qwen3(tokenizer: Any) -> Any:
    """A Qwen3 with random weights, float32.

    `head_dim` is the smallest that vLLM's CPU attention has; `initializer_range` is ten times
    the usual, so that even the untrained model says varied things.
    """
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


if __name__ == "__main__":
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(sys.argv[1])
    tiny_qwen3(tokenizer).save_pretrained(sys.argv[1])
