"""Models of states: mamba, linear attention, convolutions, alone or beside attention."""

from __future__ import annotations

from tests.families.family import Family
from tests.families.options import EXPERTS, HYBRID, LINEAR, LOCAL_EXPERTS, MAMBA2, TIED, VLLM

__all__ = ["HYBRID_MODELS"]

HYBRID_MODELS = (
    Family(
        name="qwen3-next",
        config="Qwen3NextConfig",
        kind="hybrid (linear attention), MoE",
        options={**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 64},
        published={"full_attention_interval": 2},
        arguments=HYBRID,
        bf16=True,
    ),
    Family(
        name="falcon-h1",
        config="FalconH1Config",
        bf16=True,
        kind="hybrid (mamba)",
        options={**MAMBA2, "mamba_d_ssm": 128},
        arguments=HYBRID,
    ),
    Family(
        name="nemotron-h",
        config="NemotronHConfig",
        kind="hybrid (mamba)",
        options={
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": None,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 16,
        },
        published={
            "hybrid_override_pattern": "M*-",
            "layers_block_type": ["mamba", "attention", "mlp"],
        },
        arguments=HYBRID,
    ),
    Family(
        name="granite-moe-hybrid",
        config="GraniteMoeHybridConfig",
        bf16=True,
        kind="hybrid (mamba), MoE",
        options={
            **LOCAL_EXPERTS,
            **MAMBA2,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"],
        },
        arguments=HYBRID,
    ),
    Family(
        name="lfm2",
        config="Lfm2Config",
        bf16=True,
        kind="hybrid (convolution)",
        options={**TIED, "layer_types": ["conv", "full_attention"]},
        published={"conv_dim": 64, "conv_dim_out": 64, "block_dim": 64},
        arguments=HYBRID,
    ),
    Family(
        name="lfm2-moe",
        config="Lfm2MoeConfig",
        kind="hybrid (convolution), MoE",
        options={
            **TIED,
            **EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
        arguments=HYBRID,
    ),
    Family(
        name="mamba",
        engines=VLLM,
        config="MambaConfig",
        kind="mamba",
        options={**TIED, "state_size": 16, "intermediate_size": None},
        arguments=HYBRID,
    ),
    Family(
        name="mamba2",
        config="Mamba2Config",
        kind="mamba",
        options={
            **TIED,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "intermediate_size": None,
        },
        published={"intermediate_size": 128, "rms_norm": True},
        arguments=HYBRID,
    ),
    Family(
        name="falcon-mamba",
        engines=VLLM,
        config="FalconMambaConfig",
        kind="mamba",
        options={**TIED, "state_size": 16, "intermediate_size": None},
        arguments=HYBRID,
    ),
    Family(
        name="jamba",
        engines=VLLM,
        config="JambaConfig",
        kind="hybrid (mamba), MoE",
        options={
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 16,
        },
        arguments=HYBRID,
    ),
    Family(
        name="zamba2",
        engines=VLLM,
        config="Zamba2Config",
        kind="hybrid (mamba), shared blocks",
        options={
            **TIED,
            "layers_block_type": ["mamba", "hybrid"],
            "num_key_value_heads": 2,
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "head_dim": None,
        },
        arguments=HYBRID,
    ),
)
