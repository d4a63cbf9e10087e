"""Models of latent attention (MLA)."""

from __future__ import annotations

from tests.families.family import Family
from tests.families.options import DEEPSEEK, LATENT, ROUTED

__all__ = ["LATENT_MODELS"]

LATENT_MODELS = (
    Family(
        name="deepseek-v2",
        config="DeepseekV2Config",
        kind="MLA, MoE",
        options={**LATENT, **ROUTED},
        published={"topk_method": "greedy", "scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    Family(
        name="deepseek-v3",
        config="DeepseekV3Config",
        kind="MLA, MoE",
        options={**LATENT, **ROUTED},
        published=DEEPSEEK,
        bf16=True,
    ),
    Family(
        name="glm4-moe-lite",
        config="Glm4MoeLiteConfig",
        kind="MLA, MoE",
        options={**LATENT, **ROUTED, "mlp_layer_types": ["dense", "sparse"]},
    ),
    Family(name="minicpm3", config="MiniCPM3Config", kind="MLA", options=LATENT),
    Family(
        name="longcat-flash",
        config="LongcatFlashConfig",
        bf16=True,
        kind="MLA, MoE",
        options={
            **LATENT,
            "num_layers": 1,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 0,
            "moe_topk": 2,
        },
        published={
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
        },
    ),
)
