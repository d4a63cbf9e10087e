"""Native Megatron shards cut from HF tensors, the slow and obvious way.

Written against megatron-core's documented layouts with whole-tensor `cat` and `chunk`, and
shares no code with the source map that it tests. Padding and tied copies are NaN, so that
a leak of either shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch

from engine_plugins.weights.sources.megatron.source import MegatronChunk, MegatronRank
from tests.support.megatron_hf import moe_layers

__all__ = ["megatron_ranks"]

Tensors = dict[str, torch.Tensor]
Stages = Sequence[Sequence[Sequence[int]]]
"""Per pipeline stage, per virtual chunk, the global layers."""


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """One rank's place, and how its job lays things out."""

    hf: Tensors
    config: dict[str, Any]
    tp: tuple[int, int]
    ep: tuple[int, int]
    etp: tuple[int, int]
    local_spec: bool
    experts: str
    vocab_multiple: int


def megatron_ranks(
    hf: Tensors,
    config: dict[str, Any],
    *,
    tp_size: int = 1,
    ep_size: int = 1,
    etp_size: int | None = None,
    stages: Stages | None = None,
    local_spec: bool = False,
    experts: str = "grouped",
    vocab_multiple: int = 1,
    prefix: str = "",
) -> list[MegatronRank]:
    """Cut HF tensors into what each Megatron rank would hold.

    Ranks are in Megatron's order: tensor parallel fastest, pipeline slowest; the same ranks are
    split anew for the experts. `experts` is "grouped", "sequential" or "legacy".
    """
    layout = stages or [[list(range(config["num_hidden_layers"]))]]
    etp = etp_size or tp_size
    ranks = []
    for pp_rank in range(len(layout)):
        for stage_rank in range(lcm(tp_size, ep_size * etp)):
            cut = _Cut(
                hf=hf,
                config=config,
                tp=(stage_rank % tp_size, tp_size),
                ep=(stage_rank // etp % ep_size, ep_size),
                etp=(stage_rank % etp, etp),
                local_spec=local_spec,
                experts=experts,
                vocab_multiple=vocab_multiple,
            )
            ranks.append(
                MegatronRank(
                    tp_rank=cut.tp[0],
                    tp_size=tp_size,
                    pp_rank=pp_rank,
                    pp_size=len(layout),
                    ep_rank=cut.ep[0],
                    ep_size=ep_size,
                    etp_rank=cut.etp[0] if etp_size else None,
                    etp_size=etp_size,
                    chunks=[
                        MegatronChunk(
                            tensors={
                                prefix + name: tensor.clone(memory_format=torch.contiguous_format)
                                for name, tensor in _chunk(cut, layout, (pp_rank, chunk)).items()
                            },
                            global_layers=list(layers),
                        )
                        for chunk, layers in enumerate(layout[pp_rank])
                    ],
                )
            )
    return ranks


def _chunk(cut: _Cut, layout: Stages, place: tuple[int, int]) -> Tensors:
    hf, config = cut.hf, cut.config
    pp_rank, chunk = place
    multiple = cut.vocab_multiple * cut.tp[1]
    embedding = _padded(hf["model.embed_tokens.weight"], multiple)
    native: Tensors = {}
    last = place == (len(layout) - 1, len(layout[-1]) - 1)
    # Multi-token prediction looks tokens up again: its stage has a replica of the embedding.
    if place == (0, 0) or (last and pp_rank and config.get("num_nextn_predict_layers")):
        native["embedding.word_embeddings.weight"] = _nth(embedding, cut.tp)
    for local, layer in enumerate(layout[pp_rank][chunk]):
        native |= _renamed(f"decoder.layers.{local}.", _layer(cut, layer))
    if last:
        native["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        for index in range(config.get("num_nextn_predict_layers") or 0):
            native |= _renamed(f"mtp.layers.{index}.", _mtp_layer(cut, index))
        if "lm_head.weight" in hf:
            native["output_layer.weight"] = _nth(_padded(hf["lm_head.weight"], multiple), cut.tp)
        elif place != (0, 0):
            native["output_layer.weight"] = torch.full_like(_nth(embedding, cut.tp), torch.nan)
    return native


def _mtp_layer(cut: _Cut, index: int) -> Tensors:
    layer = cut.config["num_hidden_layers"] + index
    prefix = f"model.layers.{layer}."
    return {
        "enorm.weight": cut.hf[prefix + "enorm.weight"],
        "hnorm.weight": cut.hf[prefix + "hnorm.weight"],
        "eh_proj.weight": _nth(cut.hf[prefix + "eh_proj.weight"], cut.tp),
        "final_layernorm.weight": cut.hf[prefix + "shared_head.norm.weight"],
    } | _renamed("transformer_layer.", _layer(cut, layer))


def _layer(cut: _Cut, layer: int) -> Tensors:
    hf, prefix = cut.hf, f"model.layers.{layer}."
    own = {name.removeprefix(prefix): hf[name] for name in hf if name.startswith(prefix)}
    moe = layer in moe_layers(cut.config)
    mla = "kv_lora_rank" in cut.config
    fused_input = not (cut.local_spec or mla)
    fused_mlp = not (cut.local_spec or moe)
    input_norm = "self_attention.linear_qkv.layer_norm_weight" if fused_input else ""
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if fused_mlp else ""
    native = {
        input_norm or "input_layernorm.weight": own["input_layernorm.weight"],
        mlp_norm or "pre_mlp_layernorm.weight": own["post_attention_layernorm.weight"],
        "self_attention.linear_proj.weight": _nth(own["self_attn.o_proj.weight"], cut.tp, 1),
    }
    native |= _mla(cut, own) if mla else _attention(cut, own)
    if moe:
        native |= _renamed("mlp.", _moe(cut, own))
    else:
        native |= _renamed("mlp.", _mlp(own, "mlp", cut.tp))
    return native


def _attention(cut: _Cut, own: Tensors) -> Tensors:
    groups = cut.config["num_key_value_heads"]
    native: Tensors = {}
    for leaf in ("weight", "bias"):
        if f"self_attn.q_proj.{leaf}" in own:
            query, key, value = (own[f"self_attn.{part}_proj.{leaf}"] for part in "qkv")
            if cut.config.get("attention_gate"):  # HF: each head's q, then its gate
                head = query.view(cut.config["num_attention_heads"], 2, -1, *query.shape[1:])
                queries = [
                    part for group in head.chunk(groups) for part in (group[:, 0], group[:, 1])
                ]
                parts = [each.flatten(0, 1) for each in queries]
                query_of = [torch.cat(parts[2 * n : 2 * n + 2]) for n in range(groups)]
            else:
                query_of = list(query.chunk(groups))
            grouped = zip(query_of, key.chunk(groups), value.chunk(groups), strict=True)
            fused = torch.cat([part for group in grouped for part in group])
            native[f"self_attention.linear_qkv.{leaf}"] = _nth(fused, cut.tp)
    for name, target in (
        ("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
        ("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
        ("self_attn.o_proj.bias", "self_attention.linear_proj.bias"),
    ):
        if name in own:
            native[target] = own[name]
    return native


def _mla(cut: _Cut, own: Tensors) -> Tensors:
    fused = not cut.local_spec
    query_norm = "linear_q_up_proj.layer_norm_weight" if fused else "q_layernorm.weight"
    key_norm = "linear_kv_up_proj.layer_norm_weight" if fused else "kv_layernorm.weight"
    native = {
        "linear_kv_down_proj.weight": own["self_attn.kv_a_proj_with_mqa.weight"],
        key_norm: own["self_attn.kv_a_layernorm.weight"],
        "linear_kv_up_proj.weight": _nth(own["self_attn.kv_b_proj.weight"], cut.tp),
    }
    if "self_attn.q_proj.weight" in own:
        native["linear_q_proj.weight"] = _nth(own["self_attn.q_proj.weight"], cut.tp)
    else:
        native |= {
            "linear_q_down_proj.weight": own["self_attn.q_a_proj.weight"],
            query_norm: own["self_attn.q_a_layernorm.weight"],
            "linear_q_up_proj.weight": _nth(own["self_attn.q_b_proj.weight"], cut.tp),
        }
    return _renamed("self_attention.", native)


def _moe(cut: _Cut, own: Tensors) -> Tensors:
    native = {"router.weight": own["mlp.gate.weight"]}
    if "mlp.gate.e_score_correction_bias" in own:
        native["router.expert_bias"] = own["mlp.gate.e_score_correction_bias"]
    if "mlp.shared_experts.up_proj.weight" in own:
        native |= _renamed("shared_experts.", _mlp(own, "mlp.shared_experts", cut.tp))
    count = sum(name.endswith("up_proj.weight") and ".experts." in name for name in own)
    numbers = torch.arange(count).chunk(cut.ep[1])[cut.ep[0]].tolist()
    experts = [_mlp(own, f"mlp.experts.{number}", cut.etp) for number in numbers]
    return native | _renamed("experts.", _PACKED[cut.experts](experts))


def _grouped(experts: list[Tensors]) -> Tensors:
    return {
        name + str(local): tensor
        for local, expert in enumerate(experts)
        for name, tensor in expert.items()
    }


def _sequential(experts: list[Tensors]) -> Tensors:
    return {
        f"local_experts.{local}.{name}": tensor
        for local, expert in enumerate(experts)
        for name, tensor in expert.items()
    }


def _legacy(experts: list[Tensors]) -> Tensors:
    """Matrices are the other way round, one behind the other in memory."""
    first = torch.stack([expert["linear_fc1.weight"].t() for expert in experts])
    second = torch.stack([expert["linear_fc2.weight"].t() for expert in experts])
    hidden = first.shape[1]
    return {
        "weight1": first.contiguous().view(hidden, -1),
        "weight2": second.contiguous().view(-1, hidden),
    }


_PACKED = {"grouped": _grouped, "sequential": _sequential, "legacy": _legacy}


def _mlp(own: Tensors, module: str, place: tuple[int, int]) -> Tensors:
    native: Tensors = {}
    for leaf in ("weight", "bias"):
        if f"{module}.gate_proj.{leaf}" in own:
            gate, up = (own[f"{module}.{part}_proj.{leaf}"] for part in ("gate", "up"))
            native[f"linear_fc1.{leaf}"] = torch.cat([_nth(gate, place), _nth(up, place)])
    native["linear_fc2.weight"] = _nth(own[f"{module}.down_proj.weight"], place, 1)
    if f"{module}.down_proj.bias" in own:
        native["linear_fc2.bias"] = own[f"{module}.down_proj.bias"]
    return native


def _renamed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _nth(whole: torch.Tensor, place: tuple[int, int], axis: int = 0) -> torch.Tensor:
    index, count = place
    return whole.chunk(count, axis)[index]


def _padded(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -rows.shape[0] % multiple
    return torch.cat([rows, torch.full((missing, *rows.shape[1:]), torch.nan)])
