"""Models whose config ties the head to the embedding while their checkpoint has a head of its own.

VLLM then changes its config, builds both, and ties them again after the load where they are equal.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import weight_tying

__all__ = ["config_facts", "tie_as_the_live_one", "was_tied_again"]


def config_facts(model_config: ModelConfig) -> dict[str, bool]:
    """What the checkpoint's own config says otherwise than vLLM's, which it has changed."""
    changed = model_config.word_embeddings_untied_by_checkpoint
    return {"tie_word_embeddings": True} if changed else {}


def was_tied_again(model_config: ModelConfig, modules: Iterable[nn.Module]) -> bool:
    """Whether the head of a loaded model shares the embedding, though vLLM's config says no."""
    if not model_config.word_embeddings_untied_by_checkpoint:
        return False
    vocabulary = [each for each in modules if isinstance(each, VocabParallelEmbedding)]
    embedded = {id(each.weight) for each in vocabulary if not isinstance(each, ParallelLMHead)}
    return any(
        isinstance(each, ParallelLMHead) and id(each.weight) in embedded for each in vocabulary
    )


def tie_as_the_live_one(model: nn.Module) -> None:
    """Tie the head of a model that was built by the same config and not loaded."""
    untied = weight_tying._get_untied_lm_head(model)
    if untied is not None:
        untied.tie(model)
