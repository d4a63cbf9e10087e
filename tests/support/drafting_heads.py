"""A small Llama and an EAGLE-3 head of its own checkpoint that foretells it, rightly or wrongly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["HeadedModel"]

WIDTH, VOCABULARY, DRAFTED, LAYERS, HEADS, HEAD_DIM, INNER = 64, 96, 64, 8, 2, 32, 96
TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "max_position_embeddings": 128,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
HEAD = {
    **TARGET,
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": DRAFTED,
    "num_hidden_layers": 1,
}


class HeadedModel:
    """Target and head. Tokens below `WIDTH` follow each other as a permutation says.

    A token's embedding is an axis of its own, no layer adds anything to it, and each output head
    picks the token that it says comes next. The EAGLE head sees a token and has to name the one
    after the next; a wrong one names the next.

    Attributes:
        target, head: tensors by the names of either's own checkpoint.
    """

    def __init__(self, seed: int, *, right: bool) -> None:
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed)).tolist()
        self._next = dict(zip(order, order[1:] + order[:1], strict=True))
        axes = torch.eye(VOCABULARY, WIDTH)
        self.target = {"model.embed_tokens.weight": axes, "model.norm.weight": torch.ones(WIDTH)}
        for number in range(LAYERS):
            self.target |= _layer(f"model.layers.{number}.", WIDTH, "post_attention_layernorm")
        self.head = _layer("midlayer.", 2 * WIDTH, "hidden_norm", "post_attention_layernorm")
        self.head["norm.weight"] = torch.ones(WIDTH)
        self.head["fc.weight"] = torch.eye(WIDTH).repeat(1, 3)
        self.head["d2t"] = torch.zeros(DRAFTED, dtype=torch.int64)
        self.target["lm_head.weight"] = torch.zeros(VOCABULARY, WIDTH)
        self.head["lm_head.weight"] = torch.zeros(DRAFTED, WIDTH)
        for token, following in self._next.items():
            self.target["lm_head.weight"][following, token] = 1
            drafted = self._next[following] if right else following
            self.head["lm_head.weight"][drafted, token] = 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """Both, as a trainer publishes them."""
        return self.target | {f"draft.{name}": tensor for name, tensor in self.head.items()}

    def successors(self, token: int, count: int) -> list[int]:
        """What the target says after a token."""
        said = [self._next[token]]
        while len(said) < count:
            said.append(self._next[said[-1]])
        return said

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Folders that an engine can load: the target's and the head's."""
        return _saved(folder / "target", TARGET, self.target), _saved(
            folder / "head", HEAD, self.head
        )


def _layer(prefix: str, width: int, *norms: str) -> dict[str, torch.Tensor]:
    """A layer that adds nothing to what it is given."""
    shapes = {
        **{f"self_attn.{part}_proj": (HEADS * HEAD_DIM, width) for part in "qkv"},
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    matrices = {f"{prefix}{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    ones = {f"{prefix}{n}.weight": torch.ones(WIDTH) for n in ("input_layernorm", *norms)}
    return matrices | ones


def _saved(folder: Path, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
