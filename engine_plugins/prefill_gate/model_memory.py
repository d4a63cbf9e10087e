"""What a step should take, from the model's sizes: the prior that measurements correct.

In engines that allocate KV beforehand a step's peak is its transients. They are made and freed in
phases: an encoder, the layers, the sampled logits, the logits of prompt tokens. The peak is that of
the largest phase:

    layers          = a*n + attention(n, L) + moe(n*k) + lora
    sampling        = h*n + q*rows*V
    prompt logprobs = h*n + l*rows*V + c*plp_rows*V
    encoder         = m*multimodal_tokens

with n tokens, L tokens of context, V the vocabulary, and hidden states of h bytes per token that
live until the step ends.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine_plugins.prefill_gate.step_shape import StepShape

__all__ = ["REGIMES", "AttentionMemory", "ModelMemory", "ModelSizes", "Regime"]

Regime = Literal["layers", "sampling", "prompt_logprobs", "encoder"]
REGIMES: tuple[Regime, ...] = ("layers", "sampling", "prompt_logprobs", "encoder")
"""The phases of a step, in the order in which `ModelMemory.phases` gives them."""

_FLOAT32 = 4
_SAMPLING_COPIES = 3
"""float32 tensors of a row's logits beside the logits: scores, probabilities, noise."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a model that its transients depend on; 0 where it has no such part."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    vision_hidden: int = 0
    vision_intermediate: int = 0

    @classmethod
    def from_config(cls, text_config: object, vision_config: object = None) -> ModelSizes:
        """Read a HF config of the language model, and one of its vision encoder if it has one."""
        hidden = _size(text_config, "hidden_size")
        heads = _size(text_config, "num_attention_heads")
        latent = _size(text_config, "qk_nope_head_dim") + _size(text_config, "qk_rope_head_dim")
        expert = _size(text_config, "moe_intermediate_size")
        experts = _size(text_config, "num_experts", "num_local_experts", "n_routed_experts")
        if experts and not expert:
            expert = _size(text_config, "intermediate_size")
        return cls(
            hidden=hidden,
            intermediate=_size(text_config, "intermediate_size"),
            heads=heads,
            kv_heads=_size(text_config, "num_key_value_heads") or heads,
            head_dim=_size(text_config, "head_dim") or latent or hidden // max(heads, 1),
            vocab=_size(text_config, "vocab_size"),
            experts=experts,
            experts_per_token=_size(text_config, "num_experts_per_tok", "moe_topk"),
            expert_intermediate=expert,
            shared_intermediate=_size(text_config, "shared_expert_intermediate_size")
            or expert * _size(text_config, "n_shared_experts"),
            vision_hidden=_size(vision_config, "hidden_size", "embed_dim"),
            vision_intermediate=_size(vision_config, "intermediate_size"),
        )


@dataclass(frozen=True, kw_only=True)
class AttentionMemory:
    """What an attention backend allocates beside its inputs and output, in bytes.

    Backends with workspaces of a fixed size (flash attention) have none of the three: what is fixed
    is measured.
    """

    per_token: int = 0
    per_context_token: int = 0
    per_pair: int = 0


class ModelMemory:
    """The transients of one rank's steps, phase by phase.

    Args:
        sizes: of the model.
        itemsize: bytes of an element of its activations.
        tp_size: ranks that share its heads and its MLP.
        attention: of the backend.
        fused_logprobs: whether the conversion of logits to float32 takes no memory of its own, as
            on GPUs.
        lora_rank: largest rank of an adapter; 0 without adapters.
        logprob_rows_at_once: of prompt logprobs that the engine computes together; `None` for all
            of a step.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        *,
        itemsize: int,
        tp_size: int = 1,
        attention: AttentionMemory | None = None,
        fused_logprobs: bool = False,
        lora_rank: int = 0,
        logprob_rows_at_once: int | None = None,
    ) -> None:
        attention = attention or AttentionMemory()
        converted = 0 if fused_logprobs or itemsize >= _FLOAT32 else _FLOAT32
        kept = 2 * sizes.hidden * itemsize
        mlp = 3 * sizes.intermediate * itemsize // tp_size
        self._kept = kept
        self._token = kept + max(
            mlp, _attention_bytes(sizes, itemsize, tp_size), _moe_bytes(sizes, itemsize, tp_size)
        )
        self._token += attention.per_token
        self._context = attention.per_context_token
        self._pair = attention.per_pair
        self._lora = lora_rank * _FLOAT32
        gathered = itemsize if tp_size == 1 else itemsize + itemsize // tp_size
        self._logits = gathered * sizes.vocab
        self._sampled = self._logits + _SAMPLING_COPIES * _FLOAT32 * sizes.vocab
        self._prompt_row = self._logits + (_FLOAT32 + converted) * sizes.vocab
        self._multimodal = (4 * sizes.vision_hidden + 2 * sizes.vision_intermediate) * itemsize
        self._rows_at_once = logprob_rows_at_once
        self.description: dict[str, Any] = {
            "sizes": asdict(sizes),
            "attention": asdict(attention),
            "itemsize": itemsize,
            "tp_size": tp_size,
            "fused_logprobs": fused_logprobs,
            "lora_rank": lora_rank,
            "logprob_rows_at_once": logprob_rows_at_once,
        }
        """All that the figures follow from; a calibration of another model is of no use."""

    def phases(self, shape: StepShape) -> tuple[int, int, int, int]:
        """Bytes of each phase of a step in the order of `REGIMES`; 0 for one that it has not."""
        tokens, context, pairs, rows, prompt_rows, multimodal_tokens, lora_tokens, _ = shape
        if self._rows_at_once is not None:
            prompt_rows = min(prompt_rows, self._rows_at_once)
        kept = self._kept * tokens
        return (
            self._token * tokens
            + self._context * context
            + self._pair * pairs
            + self._lora * lora_tokens,
            kept + self._sampled * rows,
            kept + self._logits * rows + self._prompt_row * prompt_rows if prompt_rows else 0,
            self._multimodal * multimodal_tokens,
        )


def _attention_bytes(sizes: ModelSizes, itemsize: int, tp_size: int) -> int:
    """Queries, keys and values as projected and as rotated, and the output."""
    heads = 3 * sizes.heads + 3 * sizes.kv_heads
    return heads * sizes.head_dim * itemsize // tp_size


def _moe_bytes(sizes: ModelSizes, itemsize: int, tp_size: int) -> int:
    """A token copied to its experts, what they make of it, their outputs, and the router's."""
    routed = 2 * sizes.hidden + 3 * sizes.expert_intermediate // tp_size
    shared = sizes.hidden + 3 * sizes.shared_intermediate // tp_size if sizes.experts else 0
    return (sizes.experts_per_token * routed + shared) * itemsize + sizes.experts * _FLOAT32


def _size(config: object, *names: str) -> int:
    """The first of the names that the config gives a number for, else 0."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if type(value) is int), 0)
