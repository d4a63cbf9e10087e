"""Models of dense layers."""

from __future__ import annotations

from tests.families.family import ENGINES, Family
from tests.families.options import SLIDING, TIED, TRITON, VLLM

__all__ = ["DENSE"]

DENSE = (
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
    Family(name="qwen2-tied", config="Qwen2Config", kind="tied", options=TIED, bf16=True),
    Family(name="qwen3", config="Qwen3Config", kind="q/k norms", bf16=True),
    Family(name="qwen3-tied", config="Qwen3Config", kind="tied", options=TIED, live=ENGINES),
    Family(name="phi3", config="Phi3Config", kind="fused checkpoint", bf16=True, live=ENGINES),
    Family(name="phi", config="PhiConfig", kind="biases"),
    Family(name="olmo", config="OlmoConfig", kind="norms without weights"),
    Family(name="olmo2", config="Olmo2Config", kind="q/k norms", live=ENGINES),
    Family(name="olmo3", config="Olmo3Config", kind="q/k norms", options=SLIDING),
    Family(name="granite", config="GraniteConfig", kind="multipliers", live=ENGINES),
    Family(name="starcoder2", config="Starcoder2Config", kind="biases", options={"use_bias": True}),
    Family(name="stablelm", config="StableLmConfig", kind="biases", options={"use_qkv_bias": True}),
    Family(name="cohere", config="CohereConfig", kind="tied", options=TIED),
    Family(name="cohere2", config="Cohere2Config", kind="tied", options={**TIED, **SLIDING}),
    Family(name="glm4", config="Glm4Config", kind="fused checkpoint"),
    Family(name="glm", engines=VLLM, config="GlmConfig", kind="fused checkpoint"),
    Family(
        name="exaone4",
        config="Exaone4Config",
        kind="q/k norms",
        options=SLIDING,
        published={"sliding_window_pattern": "LG"},
        arguments=TRITON,
    ),
    Family(
        name="hunyuan",
        config="HunYuanDenseV1Config",
        kind="q/k norms",
        published={"use_qk_norm": True},
    ),
    Family(name="apertus", config="ApertusConfig", kind="buffers", options={"hidden_act": "xielu"}),
    Family(name="arcee", config="ArceeConfig", kind="no gate"),
    Family(
        name="nemotron", config="NemotronConfig", kind="no gate", options={"hidden_act": "relu2"}
    ),
    Family(name="seed-oss", config="SeedOssConfig", kind="transformers' code"),
    Family(name="smollm3", config="SmolLM3Config", kind="transformers' code"),
    Family(name="ernie4.5", engines=VLLM, config="Ernie4_5Config", kind="dense"),
    Family(name="gpt-neox", config="GPTNeoXConfig", kind="fused checkpoint"),
    Family(name="gpt2", config="GPT2Config", kind="transposed", options=TIED),
    Family(
        name="gpt-bigcode",
        config="GPTBigCodeConfig",
        kind="fused checkpoint",
        options={**TIED, "multi_query": True},
    ),
    Family(name="gptj", config="GPTJConfig", kind="biases", options={"rotary_dim": 16}),
    Family(
        name="opt",
        config="OPTConfig",
        kind="biases",
        options={**TIED, "ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1},
    ),
    Family(name="bloom", engines=VLLM, config="BloomConfig", kind="fused checkpoint", options=TIED),
    Family(
        name="falcon",
        engines=VLLM,
        config="FalconConfig",
        kind="fused checkpoint",
        options={**TIED, "new_decoder_architecture": True, "num_kv_heads": 1, "head_dim": None},
    ),
    Family(
        name="cohere-norms",
        config="CohereConfig",
        kind="tied, q/k norms",
        options={**TIED, "use_qk_norm": True},
    ),
    Family(name="jais2", config="Jais2Config", kind="biases"),
    Family(name="cwm", config="CwmConfig", kind="dense", options=SLIDING, engines=VLLM),
    Family(name="starcoder2-tied", config="Starcoder2Config", kind="tied, biases", options=TIED),
    Family(name="persimmon", config="PersimmonConfig", kind="fused checkpoint"),
)
