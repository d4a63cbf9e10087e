r"""One of two data-parallel ranks of real Megatron-Core, with overlapped gathers, on the CPU.

    python -m tests.support.overlapping_megatron_rank RANK RENDEZVOUS

Takes one step of the distributed optimizer. Prints as JSON how many boxes of this rank differ from
the other rank's right after the step, and how many after what a sender does first in an update;
whether the next forward pass has a smaller loss; and what a sender of one rank alone is told.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.sender.megatron_job import gathers_of, ranks_of
from engine_plugins.weights.sources.megatron.source import megatron_boxes_of
from megatron_on_cpu import OnCpu, patch_for_cpu

WORLD = 2


HF = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Step, look, gather, look again."""
    rank, rendezvous = int(sys.argv[1]), sys.argv[2]
    patch_for_cpu()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    torch.manual_seed(7)
    with OnCpu():
        chunk, optimizer = _trainer()
        loss = _forward(chunk)
        loss.backward()
        optimizer.step()
        stale = _differing([chunk])
        alone = _refusal(chunk, rank)
        for gather in gathers_of([chunk], range(WORLD)):
            gather()
        left = _differing([chunk])
        goes_on = bool(_forward(chunk) < loss)
    told = {"stale": stale, "left": left, "goes_on": goes_on, "alone": alone}
    print(json.dumps(told), flush=True)
    dist.destroy_process_group()


def _trainer() -> tuple[nn.Module, Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=64,
        max_sequence_length=16,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    overlapped = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_param_gather=True, overlap_grad_reduce=True
    )
    chunk = DistributedDataParallel(config, overlapped, model)
    config.finalize_model_grads_func = finalize_model_grads
    options = OptimizerConfig(lr=0.1, use_distributed_optimizer=True, overlap_param_gather=True)
    return chunk, get_megatron_optimizer(options, [chunk])


def _forward(chunk: nn.Module) -> torch.Tensor:
    tokens = torch.arange(16)[None]
    mask = torch.ones(16, 16).triu(1).bool()[None, None]
    loss: torch.Tensor = chunk(tokens, tokens, mask, labels=tokens.roll(-1)).mean()
    return loss


def _refusal(chunk: nn.Module, rank: int) -> str:
    """What a sender says that the other rank takes no part in."""
    try:
        gathers_of([chunk], [rank])
    except SourceError as error:
        return error.message
    return ""


def _differing(chunks: list[nn.Module]) -> int:
    """How many of this rank's boxes are not what the other rank has."""
    differing = 0
    for box in megatron_boxes_of(ranks_of(chunks), HF):
        both = [torch.empty_like(box.data) for _ in range(WORLD)]
        dist.all_gather(both, box.data.contiguous())
        differing += not torch.equal(*both)
    return differing


if __name__ == "__main__":
    main()
