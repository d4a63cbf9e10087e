"""Models of random weights that are large enough to measure something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def sized_qwen3() -> Any:
    """A dense Qwen3 of 268 MB in float32; its largest modules are the 33.6 MB vocabulary ends."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=8192,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).float().eval()


@dataclass(frozen=True)
class SizedModel:
    """The same, to be served."""

    def copy_to(self, folder: Path) -> Path:
        """A folder that an engine can load."""
        sized_qwen3().save_pretrained(folder)
        return folder
