"""The sizes that CPU kernels of either engine ask for, whichever CPU they are chosen for.

Read from their own checks, in vLLM 0.32.0 and SGLang 0.5.23:

- AMX packs tiles of 16 rows by 32 columns (`convert_weight_packed` of both;
  `layers/utils.py::check_cpu_sgl_kernel`; `layers/amx_utils.py::dim_is_supported`); vLLM's latent
  attention packs whatever it has, and fails where that is not whole tiles.
- Grouped experts take hidden and intermediate sizes in multiples of 32
  (`experts/cpu_moe.py::X86CPUUnquantizedExperts`, and the portable class for one of the two).
- Attention takes heads in multiples of 32, for an FP8 cache too (`cpu_attn.py::_get_attn_isa`);
  AMX latent attention the same of what it caches (`head_size % 32`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["unfit_sizes"]

COLUMNS = 32


def unfit_sizes(config: Mapping[str, Any], *, tp_size: int = 1) -> dict[str, int]:
    """Sizes of a HF config, per rank of an engine, that some CPU kernel would not take."""
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    sizes = {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"] // tp_size,
        "moe_intermediate_size": config.get("moe_intermediate_size", 0) // tp_size,
        "head_dim": head,
        "heads": heads * head // tp_size,
    }
    if config.get("kv_lora_rank"):
        latent, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
        sizes |= {
            name: config[name]
            for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim")
        }
        sizes["cached"] = latent + rotary
        sizes["heads"] = heads * config["v_head_dim"] // tp_size
    return {name: size for name, size in sizes.items() if size % COLUMNS}
