"""The source map of a Megatron trainer: native shards as boxes of HF tensors.

Plain data in, views of the trainer's own memory out; Megatron itself is not needed.
`megatron_names` says which HF tensors a parameter holds, `megatron_layout` how it is cut.
"""

from __future__ import annotations

import re

import torch

from engine_plugins.errors import SourceError
from engine_plugins.weights.megatron_layout import Shard, cut_shard
from engine_plugins.weights.megatron_names import SUPPORTED_MODEL_TYPES, HfConfig, MegatronNames
from engine_plugins.weights.megatron_rank import MegatronChunk, MegatronRank, strip_wrappers
from engine_plugins.weights.placement import SourceBox
from engine_plugins.weights.torch_source import plain_view

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "HfConfig",
    "MegatronChunk",
    "MegatronRank",
    "megatron_boxes",
]

_LAYER_PREFIX = re.compile(r"decoder\.layers\.(\d+)\.")


def megatron_boxes(rank: MegatronRank, config: HfConfig) -> list[SourceBox]:
    """Describe what one Megatron rank holds as boxes of HF tensors.

    Replicated parameters (norms) come from every rank that has them, as equal boxes. A
    tied model publishes its embedding alone. Vocabulary padding is left out.

    Args:
        rank: the rank's chunks and coordinates.
        config: the model's HF config, as plain data or a `transformers` object.

    Returns:
        Boxes whose `data` are views of the given tensors, outside autograd.

    Raises:
        UnsupportedError: a model family, tensor class or dtype that cannot be published.
        SourceError: an unknown parameter, a shape that contradicts the config or the
            coordinates, layers that do not fit the model, or two parameters for one box.
    """
    names = MegatronNames(config)
    boxes: list[SourceBox] = []
    owners: dict[tuple[str, tuple[int, ...]], str] = {}
    for chunk in rank.chunks:
        tensors = _native_tensors(chunk)
        _check_layers(rank, chunk, tensors, names)
        for native, tensor in tensors.items():
            for box in _parameter_boxes(rank, chunk, names, native, tensor):
                place = (box.name, box.start)
                if place in owners:
                    raise SourceError(
                        f"{rank.label}: {owners[place]} and {native} both give {box.name}",
                        remedy="check global_layers, and that each chunk is given once",
                    )
                owners[place] = native
                boxes.append(box)
    return boxes


def _parameter_boxes(
    rank: MegatronRank,
    chunk: MegatronChunk,
    names: MegatronNames,
    native: str,
    tensor: torch.Tensor,
) -> list[SourceBox]:
    rule = names.find(native, chunk.global_layers)
    shard = Shard(
        name=native, data=plain_view(native, tensor), index=rank.tp_rank, count=rank.tp_size
    )
    shapes = names.shapes(rule)
    return [
        SourceBox(
            name=rule.hf[piece.part],
            global_shape=shapes[piece.part],
            start=piece.start,
            data=piece.data,
        )
        for piece in cut_shard(rule.layout, shard, shapes, names.query_groups)
    ]


def _native_tensors(chunk: MegatronChunk) -> dict[str, torch.Tensor]:
    """The chunk's tensors by bare native name, Transformer Engine's extra state left out."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in chunk.tensors.items():
        native = strip_wrappers(name)
        if native.endswith("_extra_state"):
            continue
        if native in tensors:
            raise SourceError(
                f"{native}: there twice, with and without `module.` prefixes",
                remedy="give each parameter once",
            )
        tensors[native] = tensor
    return tensors


def _check_layers(
    rank: MegatronRank,
    chunk: MegatronChunk,
    tensors: dict[str, torch.Tensor],
    names: MegatronNames,
) -> None:
    matches = (_LAYER_PREFIX.match(native) for native in tensors)
    held = {int(match[1]) for match in matches if match}
    if held != set(range(len(chunk.global_layers))):
        raise SourceError(
            f"{rank.label}: the chunk holds local layers {sorted(held)}, but global_layers has "
            f"{len(chunk.global_layers)} numbers: {list(chunk.global_layers)}",
            remedy="give global_layers one number per local layer, in order",
        )
    foreign = [layer for layer in chunk.global_layers if not 0 <= layer < names.num_layers]
    if foreign:
        raise SourceError(
            f"{rank.label}: global layers {foreign} do not lie in the model's "
            f"{names.num_layers} layers",
            remedy="count global layers from 0; check num_hidden_layers",
        )
