"""Megatron-Core with its distributed optimizer and overlapped gathers, data and tensor parallel.

    torchrun --nproc-per-node 4 examples/real_trainers/megatron_core.py --mesh 2x2 \
        --model FOLDER --engine URL

`--mesh 2x2` is two replicas of two tensor-parallel ranks, `--mesh 2` two replicas. No tensor is
gathered for the engine: it reads every rank's own shards of Megatron's fused parameters. After a
step each replica has the new values of one slice only; `update` has Megatron gather the rest first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerFast

from engine_plugins import WeightSender
from megatron_on_cpu import OnCpu, patch_for_cpu
from three_steps import ITERATIONS_PER_STEP, PROMPT, SENTENCES, judge, parsed_options


def main() -> None:
    options = parsed_options(__doc__)
    config = json.loads((Path(options.model) / "config.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    *_, tensor_parallel = (1, *(int(size) for size in options.mesh.split("x")[1:]))
    patch_for_cpu()
    dist.init_process_group("gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    torch.manual_seed(7)
    with OnCpu():
        chunk, optimizer = trainer(config)
    with WeightSender.from_megatron([chunk], config, engines=options.engine) as sender:
        for version, sentence in enumerate(SENTENCES, options.version):
            with OnCpu():
                train(chunk, optimizer, tokenizer, sentence)
            sender.update(version)
            weights = whole(chunk, config)
            if dist.get_rank() == 0:
                judge(options.engine, options.model, weights.items())
    dist.destroy_process_group()


def trainer(hf: dict[str, Any]) -> tuple[Any, Any]:
    """A Qwen3 of the config's sizes, wrapped for data parallelism, and its optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        tensor_model_parallel_size=get_tensor_model_parallel_world_size(),
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf["head_dim"],
        ffn_hidden_size=hf["intermediate_size"],
        layernorm_epsilon=hf["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True),
        vocab_size=hf["vocab_size"],
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    overlapped = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_param_gather=True, overlap_grad_reduce=True
    )
    chunk = DistributedDataParallel(config, overlapped, model)
    options = OptimizerConfig(
        lr=4e-3,
        weight_decay=0.0,
        clip_grad=0.0,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )
    return chunk, get_megatron_optimizer(options, [chunk])


def train(chunk: Any, optimizer: Any, tokenizer: Any, sentence: str) -> None:
    """Some iterations towards one sentence."""
    from megatron.core.distributed import finalize_model_grads

    said = tokenizer(PROMPT + sentence + tokenizer.eos_token, return_tensors="pt").input_ids
    tokens, labels = said[:, :-1], said[:, 1:]
    learned = torch.arange(labels.shape[1]) >= len(tokenizer(PROMPT).input_ids) - 1
    places = torch.arange(tokens.shape[1])[None]
    hidden = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()[None, None]
    for _ in range(ITERATIONS_PER_STEP):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = chunk(tokens, places, hidden, labels=labels)
        losses[:, learned].mean().backward()
        finalize_model_grads([chunk])
        optimizer.step()


@torch.no_grad()
def whole(chunk: Any, hf: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The HF tensors, put together by hand, for the judge alone. Collective."""
    shards = {name: gathered(parameter) for name, parameter in chunk.module.named_parameters()}
    head, groups = hf["head_dim"], hf["num_key_value_heads"]
    per_group = [hf["num_attention_heads"] // groups * head, head, head]
    found = {
        "model.embed_tokens.weight": torch.cat(shards["embedding.word_embeddings.weight"]),
        "model.norm.weight": shards["decoder.final_layernorm.weight"][0],
        "lm_head.weight": torch.cat(shards["output_layer.weight"]),
    }
    for layer in range(hf["num_hidden_layers"]):
        start, to = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for native, name in NORMS.items():
            found[to + name] = shards[start + native][0]
        for native, name in ROWS_CUT.items():
            found[to + name] = torch.cat(shards[start + native], 1)
        fused = torch.cat(shards[f"{start}self_attention.linear_qkv.weight"])
        for part, rows in zip(
            "qkv", fused.unflatten(0, (groups, -1)).split(per_group, 1), strict=True
        ):
            found[f"{to}self_attn.{part}_proj.weight"] = rows.flatten(0, 1)
        halves = [shard.chunk(2) for shard in shards[f"{start}mlp.linear_fc1.weight"]]
        for part, cut in zip(("gate", "up"), zip(*halves, strict=True), strict=True):
            found[f"{to}mlp.{part}_proj.weight"] = torch.cat(cut)
    return found


NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
ROWS_CUT = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
"""What is cut on axis 1."""


def gathered(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The shards of all tensor-parallel ranks."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    group = get_tensor_model_parallel_group()
    shards = [torch.empty_like(parameter) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, parameter.detach().contiguous(), group=group)
    return shards


if __name__ == "__main__":
    main()
