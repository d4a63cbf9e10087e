"""Gemma's: norms that add one to their weights, and buffers that a checkpoint fills."""

from __future__ import annotations

from tests.families.family import ENGINES, Family
from tests.families.options import GELU, SLIDING, TIED, TRITON

__all__ = ["GEMMA"]

GEMMA = (
    Family(name="gemma", config="GemmaConfig", kind="Gemma norms", options={**TIED, **GELU}),
    Family(
        name="gemma2",
        config="Gemma2Config",
        kind="Gemma norms",
        options=TIED,
        published=GELU,
        bf16=True,
        live=ENGINES,
    ),
    Family(
        name="gemma3",
        config="Gemma3TextConfig",
        kind="Gemma norms",
        options={**TIED, **SLIDING},
        bf16=True,
        live=ENGINES,
    ),
    Family(
        name="gemma3n",
        config="Gemma3nTextConfig",
        kind="buffers",
        options={
            **TIED,
            **SLIDING,
            "intermediate_size": [128, 128],
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0, 0.0],
            "laurel_rank": 32,
        },
        arguments=TRITON,
    ),
    Family(
        name="gemma4",
        config="Gemma4TextConfig",
        kind="buffers",
        options={
            **TIED,
            **SLIDING,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "enable_moe_block": False,
        },
        arguments=TRITON,
        bf16=True,
    ),
    Family(name="vaultgemma", config="VaultGemmaConfig", kind="Gemma norms", options=TIED),
)
