"""The models of `make families`: tiny, random, each of another family of transformers.

Sizes are such as the CPU kernels of both engines take (`tests.support.cpu_sizes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BASE", "ENGINES", "FAMILIES", "LIVE", "Case", "Family", "cases_of", "family_named"]

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


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the table: a model in a dtype, or `LIVE`."""

    family: Family
    way: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.family.name}-{self.way}"


LIVE = "live"
"""The way of a case whose model is served by a real server, in float32."""


def cases_of(kind: str) -> list[Case]:
    """All cases of an engine, in the table's order."""
    found = []
    for family in FAMILIES:
        if kind in family.engines:
            found.append(Case(family=family))
            if family.bf16:
                found.append(Case(family=family, way="bfloat16"))
            if kind in family.live:
                found.append(Case(family=family, way=LIVE))
    return found


def family_named(name: str) -> Family:
    """The family of a name."""
    return next(family for family in FAMILIES if family.name == name)


_TIED: Options = {"tie_word_embeddings": True}
_EXPERTS: Options = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_LOCAL_EXPERTS: Options = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Options = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: Options = {
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": None,
}
_DEEPSEEK: Options = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}
_MAMBA2: Options = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
}
_LINEAR: Options = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_SLIDING: Options = {"layer_types": ["sliding_attention", "full_attention"]}
_GELU: Options = {"hidden_act": "gelu_pytorch_tanh"}
_HYBRID = {
    "sglang": {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True},
}
_TRITON = {"sglang": {"attention_backend": "triton"}}
_VLLM = ("vllm",)

_DENSE = (
    Family(name="llama", config="LlamaConfig", kind="dense", bf16=True, live=ENGINES),
    Family(
        name="llama-biased",
        config="LlamaConfig",
        kind="biases",
        options={"attention_bias": True, "mlp_bias": True},
    ),
    Family(name="mistral", config="MistralConfig", kind="dense"),
    Family(name="ministral3", config="Ministral3Config", kind="dense"),
    Family(name="qwen2", config="Qwen2Config", kind="biases", bf16=True, live=ENGINES),
    Family(name="qwen2-tied", config="Qwen2Config", kind="tied", options=_TIED, bf16=True),
    Family(name="qwen3", config="Qwen3Config", kind="q/k norms", bf16=True),
    Family(name="qwen3-tied", config="Qwen3Config", kind="tied", options=_TIED, live=ENGINES),
    Family(name="phi3", config="Phi3Config", kind="fused checkpoint", bf16=True, live=ENGINES),
    Family(name="phi", config="PhiConfig", kind="biases"),
    Family(name="olmo", config="OlmoConfig", kind="norms without weights"),
    Family(name="olmo2", config="Olmo2Config", kind="q/k norms", live=ENGINES),
    Family(name="olmo3", config="Olmo3Config", kind="q/k norms", options=_SLIDING),
    Family(name="granite", config="GraniteConfig", kind="multipliers", live=ENGINES),
    Family(name="starcoder2", config="Starcoder2Config", kind="biases", options={"use_bias": True}),
    Family(name="stablelm", config="StableLmConfig", kind="biases", options={"use_qkv_bias": True}),
    Family(name="cohere", config="CohereConfig", kind="tied", options=_TIED),
    Family(name="cohere2", config="Cohere2Config", kind="tied", options={**_TIED, **_SLIDING}),
    Family(name="glm4", config="Glm4Config", kind="fused checkpoint"),
    Family(name="glm", config="GlmConfig", kind="fused checkpoint"),
    Family(name="exaone4", config="Exaone4Config", kind="q/k norms", options=_SLIDING),
    Family(name="hunyuan", config="HunYuanDenseV1Config", kind="q/k norms"),
    Family(name="apertus", config="ApertusConfig", kind="buffers", options={"hidden_act": "xielu"}),
    Family(name="arcee", config="ArceeConfig", kind="no gate"),
    Family(
        name="nemotron", config="NemotronConfig", kind="no gate", options={"hidden_act": "relu2"}
    ),
    Family(name="seed-oss", config="SeedOssConfig", kind="transformers' code"),
    Family(name="smollm3", config="SmolLM3Config", kind="transformers' code"),
    Family(name="ernie4.5", config="Ernie4_5Config", kind="dense"),
    Family(name="gpt-neox", config="GPTNeoXConfig", kind="fused checkpoint"),
    Family(name="gpt2", config="GPT2Config", kind="transposed", options=_TIED),
    Family(
        name="gpt-bigcode",
        config="GPTBigCodeConfig",
        kind="fused checkpoint",
        options={**_TIED, "multi_query": True},
    ),
    Family(name="gptj", config="GPTJConfig", kind="biases", options={"rotary_dim": 16}),
    Family(
        name="opt",
        config="OPTConfig",
        kind="biases",
        options={**_TIED, "ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1},
    ),
    Family(name="bloom", config="BloomConfig", kind="fused checkpoint", options=_TIED),
    Family(
        name="falcon",
        config="FalconConfig",
        kind="fused checkpoint",
        options={**_TIED, "new_decoder_architecture": True, "num_kv_heads": 1},
    ),
    Family(name="persimmon", config="PersimmonConfig", kind="fused checkpoint"),
)

_GEMMA = (
    Family(name="gemma", config="GemmaConfig", kind="Gemma norms", options={**_TIED, **_GELU}),
    Family(
        name="gemma2",
        config="Gemma2Config",
        kind="Gemma norms",
        options=_TIED,
        published=_GELU,
        bf16=True,
        live=ENGINES,
    ),
    Family(
        name="gemma3",
        config="Gemma3TextConfig",
        kind="Gemma norms",
        options={**_TIED, **_SLIDING},
        bf16=True,
        live=ENGINES,
    ),
    Family(
        name="gemma3n",
        config="Gemma3nTextConfig",
        kind="buffers",
        options={
            **_TIED,
            **_SLIDING,
            "intermediate_size": [128, 128],
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0, 0.0],
            "laurel_rank": 32,
        },
        arguments=_TRITON,
    ),
    Family(
        name="gemma4",
        config="Gemma4TextConfig",
        kind="buffers",
        options={
            **_TIED,
            **_SLIDING,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "enable_moe_block": False,
        },
        arguments=_TRITON,
        bf16=True,
    ),
    Family(name="vaultgemma", config="VaultGemmaConfig", kind="Gemma norms", options=_TIED),
)

_MOE = (
    Family(
        name="qwen2-moe",
        config="Qwen2MoeConfig",
        kind="MoE",
        options={**_EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    Family(
        name="qwen3-moe",
        config="Qwen3MoeConfig",
        kind="MoE",
        options=_EXPERTS,
        bf16=True,
        live=ENGINES,
    ),
    Family(
        name="mixtral", config="MixtralConfig", kind="MoE", options=_LOCAL_EXPERTS, live=ENGINES
    ),
    Family(
        name="olmoe",
        config="OlmoeConfig",
        kind="MoE",
        options={**_EXPERTS, "intermediate_size": 32, "num_key_value_heads": 2},
    ),
    Family(name="flex-olmo", config="FlexOlmoConfig", kind="MoE", options=_EXPERTS),
    Family(
        name="granite-moe",
        config="GraniteMoeConfig",
        kind="MoE, fused checkpoint",
        options=_LOCAL_EXPERTS,
    ),
    Family(
        name="granite-moe-shared",
        config="GraniteMoeSharedConfig",
        kind="MoE, fused checkpoint",
        options={**_LOCAL_EXPERTS, "shared_intermediate_size": 64},
    ),
    Family(
        name="gpt-oss",
        config="GptOssConfig",
        kind="MoE, fused checkpoint",
        options={**_LOCAL_EXPERTS, **_SLIDING},
        bf16=True,
        live=ENGINES,
    ),
    Family(name="glm4-moe", config="Glm4MoeConfig", kind="MoE", options=_ROUTED, bf16=True),
    Family(name="dots1", config="Dots1Config", kind="MoE, buffers", options=_ROUTED),
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
            **_EXPERTS,
            **_SLIDING,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Family(
        name="minimax-m2",
        config="MiniMaxM2Config",
        kind="MoE",
        options=_LOCAL_EXPERTS,
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
    ),
    Family(
        name="exaone-moe",
        config="ExaoneMoeConfig",
        kind="MoE",
        options={
            **_EXPERTS,
            **_SLIDING,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Family(
        name="cohere2-moe", config="Cohere2MoeConfig", kind="MoE", options={**_EXPERTS, **_TIED}
    ),
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
        name="dbrx",
        config="DbrxConfig",
        kind="MoE, fused checkpoint",
        options={
            "d_model": 64,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 128,
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
    ),
    Family(
        name="phimoe",
        config="PhimoeConfig",
        kind="MoE",
        options={**_LOCAL_EXPERTS, "attention_bias": True, "lm_head_bias": True},
    ),
    Family(name="mellum", config="MellumConfig", kind="MoE", options=_EXPERTS),
    Family(name="laguna", config="LagunaConfig", kind="MoE", options=_EXPERTS),
    Family(name="hy-v3", config="HYV3Config", kind="MoE", options=_EXPERTS),
    Family(name="mimo-v2-flash", config="MiMoV2FlashConfig", kind="MoE", options=_ROUTED),
)

_MLA = (
    Family(
        name="deepseek-v2",
        config="DeepseekV2Config",
        kind="MLA, MoE",
        options={**_LATENT, **_ROUTED},
        published={"topk_method": "greedy", "scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    Family(
        name="deepseek-v3",
        config="DeepseekV3Config",
        kind="MLA, MoE",
        options={**_LATENT, **_ROUTED},
        published=_DEEPSEEK,
        bf16=True,
        live=ENGINES,
    ),
    Family(
        name="glm4-moe-lite",
        config="Glm4MoeLiteConfig",
        kind="MLA, MoE",
        options={**_LATENT, **_ROUTED, "mlp_layer_types": ["dense", "sparse"]},
    ),
    Family(name="minicpm3", config="MiniCPM3Config", kind="MLA", options=_LATENT),
    Family(
        name="longcat-flash",
        config="LongcatFlashConfig",
        kind="MLA, MoE",
        options={
            **_LATENT,
            "num_layers": 1,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
    ),
)

_HYBRIDS = (
    Family(
        name="qwen3-next",
        config="Qwen3NextConfig",
        kind="hybrid (linear attention), MoE",
        options={**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 64},
        arguments=_HYBRID,
        bf16=True,
    ),
    Family(
        name="qwen3.5",
        config="Qwen3_5TextConfig",
        kind="hybrid (linear attention)",
        options=_LINEAR,
        arguments=_HYBRID,
    ),
    Family(
        name="qwen3.5-moe",
        config="Qwen3_5MoeTextConfig",
        kind="hybrid (linear attention), MoE",
        options={**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 64},
        arguments=_HYBRID,
    ),
    Family(
        name="falcon-h1",
        config="FalconH1Config",
        kind="hybrid (mamba)",
        options={**_MAMBA2, "mamba_d_ssm": 128},
        arguments=_HYBRID,
    ),
    Family(
        name="nemotron-h",
        config="NemotronHConfig",
        kind="hybrid (mamba)",
        options={
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_hidden_layers": None,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
        arguments=_HYBRID,
    ),
    Family(
        name="granite-moe-hybrid",
        config="GraniteMoeHybridConfig",
        kind="hybrid (mamba), MoE",
        options={
            **_LOCAL_EXPERTS,
            **_MAMBA2,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"],
        },
        arguments=_HYBRID,
    ),
    Family(
        name="lfm2",
        config="Lfm2Config",
        kind="hybrid (convolution)",
        options={**_TIED, "layer_types": ["conv", "full_attention"]},
        arguments=_HYBRID,
    ),
    Family(
        name="lfm2-moe",
        config="Lfm2MoeConfig",
        kind="hybrid (convolution), MoE",
        options={
            **_TIED,
            **_EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
        arguments=_HYBRID,
    ),
    Family(
        name="mamba",
        config="MambaConfig",
        kind="mamba",
        options={**_TIED, "state_size": 16, "intermediate_size": None},
        arguments=_HYBRID,
    ),
    Family(
        name="mamba2",
        config="Mamba2Config",
        kind="mamba",
        options={
            **_TIED,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "intermediate_size": None,
        },
        arguments=_HYBRID,
    ),
    Family(
        name="falcon-mamba",
        config="FalconMambaConfig",
        kind="mamba",
        options={**_TIED, "state_size": 16, "intermediate_size": None},
        arguments=_HYBRID,
    ),
    Family(
        name="jamba",
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
        arguments=_HYBRID,
    ),
    Family(
        name="zamba2",
        config="Zamba2Config",
        kind="hybrid (mamba), shared blocks",
        options={
            "layers_block_type": ["mamba", "hybrid"],
            "num_key_value_heads": 2,
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
        },
        arguments=_HYBRID,
    ),
    Family(
        name="olmo-hybrid",
        config="OlmoHybridConfig",
        kind="hybrid (linear attention)",
        options=_LINEAR,
        arguments=_HYBRID,
    ),
)

FAMILIES = (*_DENSE, *_GEMMA, *_MOE, *_MLA, *_HYBRIDS)
