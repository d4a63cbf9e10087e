"""Options that configs of several families share."""

from __future__ import annotations

from tests.families.family import Options

__all__ = [
    "DEEPSEEK",
    "EXPERTS",
    "GELU",
    "HYBRID",
    "LATENT",
    "LINEAR",
    "LOCAL_EXPERTS",
    "MAMBA2",
    "ROUTED",
    "SLIDING",
    "TIED",
    "TRITON",
    "VLLM",
]

TIED: Options = {"tie_word_embeddings": True}
EXPERTS: Options = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LOCAL_EXPERTS: Options = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: Options = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: Options = {
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": None,
}
DEEPSEEK: Options = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}
MAMBA2: Options = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
}
LINEAR: Options = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
SLIDING: Options = {"layer_types": ["sliding_attention", "full_attention"]}
GELU: Options = {"hidden_act": "gelu_pytorch_tanh"}
HYBRID = {
    "sglang": {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True},
}
TRITON = {"sglang": {"attention_backend": "triton"}}
VLLM = ("vllm",)
