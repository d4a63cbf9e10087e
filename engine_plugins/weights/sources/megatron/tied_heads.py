"""An output head of its own under a config that ties it to the embedding.

Engines build a tied model from the embedding alone and drop the head that they are given. A head
that was trained apart would be lost without a word, so it is refused; a copy of the embedding is
not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.model_facts import model_facts
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.megatron.rank import MegatronChunk, MegatronRank, strip_wrappers

__all__ = [
    "TIED",
    "check_megatron_heads",
    "checked_boxes",
    "checked_choice",
    "is_tied",
]

_ROWS = 4096
"""Compared at once: a trainer has no room to spare for masks of a whole vocabulary."""
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "embeddings.weight")
TIED = (*_HEADS, *_EMBEDDINGS)
"""How names of output heads and embeddings end."""


def is_tied(config: object, weights: object) -> bool:
    """Whether the HF config, or the model's own where none is given, ties head and embedding."""
    facts = model_facts(getattr(weights, "config", None) if config is None else config)
    return facts.get("tie_word_embeddings") is True


def checked_boxes(boxes: Sequence[SourceBox], *, tied: bool) -> Sequence[SourceBox]:
    """The boxes, of a tied model once its head is known to be the embedding.

    They are compared as far as this process holds both; two names over one memory are not.

    Raises:
        SourceError: a head with values of its own in a tied model.
    """
    if tied:
        _check_head(boxes)
    return boxes


def checked_choice(chosen: Sequence[SourceBox], boxes: Sequence[SourceBox]) -> Sequence[SourceBox]:
    """The chosen boxes of a tied model, which have its head and its embedding both or neither.

    Args:
        chosen: what is sent.
        boxes: of these, with the head and the embedding, chosen or not.

    Raises:
        SourceError: the head is chosen without the embedding; or, with either of them chosen, a
            head with values of its own.
    """
    names = {box.name for box in chosen}
    heads = [name for name in names if name.endswith(_HEADS)]
    embeds = any(name.endswith(_EMBEDDINGS) for name in names)
    if heads and not embeds and any(box.name.endswith(_EMBEDDINGS) for box in boxes):
        raise SourceError(
            f"only= chooses {heads[0]} without the embedding, but the HF config has "
            "tie_word_embeddings = true: engines take the embedding for it and would drop it",
            remedy="choose the embedding too, or alone",
        )
    if heads or embeds:
        _check_head(boxes)
    return chosen


def _check_head(boxes: Iterable[SourceBox]) -> None:
    held = [box for box in boxes if box.data.numel()]
    heads = [box for box in held if box.name.endswith(_HEADS)]
    for head in heads:
        same_place = [
            box.data
            for box in held
            if box.name.endswith(_EMBEDDINGS)
            and (box.global_shape, box.start, box.shape)
            == (head.global_shape, head.start, head.shape)
        ]
        if same_place and all(_differ(head.data, embedding) for embedding in same_place):
            raise _own_head(head.name)


def check_megatron_heads(ranks: Sequence[MegatronRank]) -> None:
    """Check that the output layers of a tied model are copies of the embedding.

    The last of several pipeline stages has such a copy. The module says whether its output layer
    is one; of a chunk built by hand the values say it, where the embedding is at hand.

    Args:
        ranks: all that this process holds.

    Raises:
        SourceError: an output layer of its own.
    """
    for rank in ranks:
        for chunk in rank.chunks:
            head = _tensor(chunk, "output_layer.weight")
            if head is None:
                continue
            shared = _is_shared(chunk.module)
            if shared is None:
                shared = not any(_differ(head, found) for found in _embeddings(ranks, rank))
            if not shared:
                raise _own_head("output_layer.weight")


def _own_head(name: str) -> SourceError:
    return SourceError(
        f"{name} has values of its own, but the HF config has tie_word_embeddings = true: engines "
        "would serve the embedding in its place, and the trained head would be lost",
        remedy="set tie_word_embeddings to false in the HF config, here and in the checkpoint that "
        "the engine is started with; or tie the head in training too",
    )


def _is_shared(module: nn.Module | None) -> bool | None:
    """What a Megatron model says itself; None if it does not say."""
    for part in () if module is None else module.modules():
        said = getattr(part, "share_embeddings_and_output_weights", None)
        if isinstance(said, bool):
            return said
    return None


def _embeddings(ranks: Sequence[MegatronRank], of: MegatronRank) -> list[torch.Tensor]:
    """The embedding's shard beside a head's, from any pipeline stage that is here."""
    places = [rank for rank in ranks if (rank.tp_rank, rank.tp_size) == (of.tp_rank, of.tp_size)]
    found = (
        _tensor(chunk, "embedding.word_embeddings.weight")
        for rank in places
        for chunk in rank.chunks
    )
    return [tensor for tensor in found if tensor is not None]


def _tensor(chunk: MegatronChunk, native: str) -> torch.Tensor | None:
    return next(
        (tensor for name, tensor in chunk.tensors.items() if strip_wrappers(name) == native), None
    )


def _differ(head: torch.Tensor, embedding: torch.Tensor) -> bool:
    """Whether a number of the head is not that of the embedding. A NaN is no trained value."""
    if head.shape != embedding.shape:
        return True
    if head.data_ptr() == embedding.data_ptr() and head.stride() == embedding.stride():
        return False
    pairs = zip(head.detach().split(_ROWS), embedding.detach().split(_ROWS), strict=True)
    return any(bool(((own != other.to(own.device)) & ~own.isnan()).any()) for own, other in pairs)
