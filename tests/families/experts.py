"""Models of experts."""

from __future__ import annotations

from tests.families.family import ENGINES, Family
from tests.families.options import EXPERTS, LOCAL_EXPERTS, ROUTED, SLIDING, TIED, TRITON, VLLM

__all__ = ["EXPERTS_MODELS"]

EXPERTS_MODELS = (
    Family(
        name="qwen2-moe",
        config="Qwen2MoeConfig",
        kind="MoE",
        options={**EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    Family(
        name="qwen3-moe",
        config="Qwen3MoeConfig",
        kind="MoE",
        options=EXPERTS,
        bf16=True,
        live=ENGINES,
    ),
    Family(
        name="mixtral",
        config="MixtralConfig",
        bf16=True,
        kind="MoE",
        options=LOCAL_EXPERTS,
        live=ENGINES,
    ),
    Family(
        name="olmoe",
        config="OlmoeConfig",
        kind="MoE",
        options={**EXPERTS, "intermediate_size": 32, "num_key_value_heads": 2},
    ),
    Family(
        name="granite-moe",
        config="GraniteMoeConfig",
        kind="MoE, fused checkpoint",
        options=LOCAL_EXPERTS,
    ),
    Family(
        name="granite-moe-shared",
        config="GraniteMoeSharedConfig",
        kind="MoE, fused checkpoint",
        options={**LOCAL_EXPERTS, "shared_intermediate_size": 64},
    ),
    Family(
        name="gpt-oss",
        config="GptOssConfig",
        kind="MoE, fused checkpoint",
        options={**LOCAL_EXPERTS, **SLIDING},
        bf16=True,
        live=VLLM,
        arguments=TRITON,
    ),
    Family(name="glm4-moe", config="Glm4MoeConfig", kind="MoE", options=ROUTED, bf16=True),
    Family(name="dots1", config="Dots1Config", kind="MoE, buffers", options=ROUTED),
    Family(
        name="ernie4.5-moe",
        config="Ernie4_5_MoeConfig",
        kind="MoE",
        options={
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    Family(
        name="afmoe",
        config="AfmoeConfig",
        kind="MoE",
        options={
            **EXPERTS,
            **SLIDING,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        published={"score_func": "sigmoid", "route_norm": True},
    ),
    Family(
        name="minimax-m2",
        config="MiniMaxM2Config",
        bf16=True,
        kind="MoE",
        options=LOCAL_EXPERTS,
        published={
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "rotary_dim": 32,
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "use_mtp": False,
        },
    ),
    Family(
        name="hunyuan-moe",
        config="HunYuanMoEV1Config",
        kind="MoE",
        options={"num_experts": 4, "moe_topk": 2},
        published={
            "moe_intermediate_size": 128,
            "num_shared_expert": 1,
            "use_qk_norm": True,
            "use_mixed_mlp_moe": 1,
        },
    ),
    Family(
        name="exaone-moe",
        config="ExaoneMoeConfig",
        kind="MoE",
        options={
            **EXPERTS,
            **SLIDING,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        published={"is_moe_layer": [False, True], "sliding_window_pattern": "LG"},
        arguments=TRITON,
    ),
    Family(name="cohere2-moe", config="Cohere2MoeConfig", kind="MoE", options={**EXPERTS, **TIED}),
    Family(
        name="llama4",
        config="Llama4TextConfig",
        kind="MoE, fused checkpoint",
        options={
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 1,
            "intermediate_size": 64,
        },
    ),
    Family(
        name="phimoe",
        config="PhimoeConfig",
        engines=VLLM,
        kind="MoE",
        options={**LOCAL_EXPERTS, "attention_bias": True, "lm_head_bias": True},
    ),
    Family(name="mellum", config="MellumConfig", kind="MoE", options=EXPERTS),
    Family(name="laguna", config="LagunaConfig", kind="MoE", options=EXPERTS),
    Family(
        name="hy-v3",
        config="HYV3Config",
        kind="MoE",
        options={**EXPERTS, "mlp_layer_types": ["dense", "sparse"], "num_shared_experts": 1},
        published={
            "first_k_dense_replace": 1,
            "route_norm": True,
            "qk_norm": True,
            "expert_hidden_dim": 32,
        },
    ),
)
