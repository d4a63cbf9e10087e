"""What is said of one model of `make families`, and the options that many of them share.

Sizes are such as the CPU kernels of both engines take (`tests.support.cpu_sizes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AFTER_ZEROS", "BASE", "BF16", "ENGINES", "FLOAT32", "LIVE", "WAYS", "Case", "Family"]

Options = Mapping[str, Any]

ENGINES = ("vllm", "sglang")

BASE: Options = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""What every config is made with, unless its family says otherwise; None leaves one out."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model of the list.

    Attributes:
        name: of the family, and of its row in the table.
        config: name of its config class in transformers.
        kind: what it is an example of.
        options: of the config, over `BASE`.
        published: keys of config.json that its checkpoints have and transformers does not write.
        engines: those that know the family on a CPU, or run it by transformers' code.
        arguments: further ones of an engine, by engine.
        bf16: whether it is judged in bfloat16 as well.
        live: engines whose real servers are updated with it.
    """

    name: str
    config: str
    kind: str
    options: Options = field(default_factory=dict)
    published: Options = field(default_factory=dict)
    engines: tuple[str, ...] = ENGINES
    arguments: Mapping[str, Options] = field(default_factory=dict)
    bf16: bool = False
    live: tuple[str, ...] = ()


FLOAT32, BF16 = "float32", "bfloat16"
AFTER_ZEROS = "after zeros"
"""The way of a case in float32 whose first update carries zeros: they prove no layout."""
LIVE = "live"
"""The way of a case whose model is served by a real server, in float32."""
WAYS = (FLOAT32, BF16, AFTER_ZEROS, LIVE)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the table: a model, and the way in which it is judged."""

    family: Family
    way: str = FLOAT32

    @property
    def name(self) -> str:
        return f"{self.family.name}-{self.way}".replace(" ", "-")

    @property
    def dtype(self) -> str:
        return BF16 if self.way == BF16 else FLOAT32
