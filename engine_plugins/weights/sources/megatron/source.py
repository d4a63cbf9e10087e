"""The source map of a Megatron trainer: native shards as boxes of HF tensors.

Plain data in, views of the trainer's own memory out; Megatron itself is not needed.
`megatron/names.py` says which HF tensors a parameter holds, `megatron/layout.py` how it is cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.megatron.config import check_norms
from engine_plugins.weights.sources.megatron.layout import (
    Cut,
    Piece,
    Role,
    Rows,
    Shape,
    Shard,
    cut_shard,
    with_output_gate,
)
from engine_plugins.weights.sources.megatron.legacy import split_legacy_experts
from engine_plugins.weights.sources.megatron.made import MadeTensors
from engine_plugins.weights.sources.megatron.names import (
    SUPPORTED_MODEL_TYPES,
    HfConfig,
    MegatronNames,
    classified,
)
from engine_plugins.weights.sources.megatron.rank import MegatronChunk, MegatronRank, strip_wrappers
from engine_plugins.weights.sources.megatron.registry import GivenRules
from engine_plugins.weights.sources.megatron.rules import Rule
from engine_plugins.weights.sources.megatron.stacked import stacked_gated, stacked_plain
from engine_plugins.weights.sources.megatron.tied_heads import check_megatron_heads
from engine_plugins.weights.sources.torch_source import plain_view

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "HfConfig",
    "MegatronChunk",
    "MegatronRank",
    "megatron_boxes",
    "megatron_boxes_of",
]

_LAYER_PREFIX = re.compile(r"decoder\.layers\.(\d+)\.")
_GROUPED = re.compile(r"\.mlp\.experts\.linear_fc1\.\w+\d+$")
"""Sequential experts, dense layers and shared experts do not look at the option."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parameter:
    """One native parameter of a chunk, and its rule."""

    native: str
    tensor: torch.Tensor
    rule: Rule
    glu_interleave: int | None


def megatron_boxes(
    rank: MegatronRank,
    config: HfConfig,
    rules: GivenRules | None = None,
    made: MadeTensors | None = None,
) -> list[SourceBox]:
    """Describe what one Megatron rank holds as boxes of HF tensors.

    Replicated parameters (norms) come from every rank that has them, as equal boxes. A
    tied model publishes its embedding alone. Vocabulary padding is left out.

    Args:
        rank: the rank's chunks and coordinates.
        config: the model's HF config, as plain data or a `transformers` object.
        rules: rules of its own, before those of the model's family.
        made: copies made before; they are filled again and stay where they are.

    Returns:
        Boxes whose `data` are views of the given tensors, outside autograd. Where HF's values or
        their order are such that no view has them (`made`), copies.

    Raises:
        UnsupportedError: a model family, tensor class or dtype that cannot be published.
        SourceError: an unknown parameter or module class, a shape that contradicts the config
            or the coordinates, layers or experts that do not fit the model, two parameters
            for one box, or an output layer of its own in a tied model. The text names the rank
            and the parameter.
    """
    names = MegatronNames(config, rules)
    made = MadeTensors() if made is None else made
    made.begin()
    boxes: list[SourceBox] = []
    owners: dict[tuple[str, tuple[int, ...]], str] = {}
    with _naming(rank):
        if names.tied:
            check_megatron_heads([rank])
        for chunk in rank.chunks:
            if chunk.module is not None:
                check_norms(chunk.module, zero_centered=names.zero_centered)
        for parameter in _parameters(rank, names):
            for box in _parameter_boxes(rank, names, parameter, made):
                place = (box.name, box.start)
                if place in owners:
                    raise SourceError(
                        f"{owners[place]} and {parameter.native} both give {box.name}",
                        remedy="check global_layers, and that each chunk is given once",
                    )
                owners[place] = parameter.native
                boxes.append(box)
    return boxes


def megatron_boxes_of(
    ranks: Sequence[MegatronRank],
    config: HfConfig,
    rules: GivenRules | None = None,
    made: MadeTensors | None = None,
) -> list[SourceBox]:
    """The boxes of several ranks that one process plays; see `megatron_boxes`."""
    if len(ranks) > 1 and MegatronNames(config, rules).tied:
        check_megatron_heads(ranks)
    return [box for rank in ranks for box in megatron_boxes(rank, config, rules, made)]


@contextmanager
def _naming(rank: MegatronRank) -> Iterator[None]:
    """Say in every error of a rank's parameters which rank it was."""
    try:
        yield
    except (SourceError, UnsupportedError) as error:
        raise type(error)(f"{rank.label}: {error.message}", remedy=error.remedy) from error


def _parameters(rank: MegatronRank, names: MegatronNames) -> Iterator[_Parameter]:
    for chunk in rank.chunks:
        tensors = _native_tensors(chunk)
        classes = {strip_wrappers(name): kind for name, kind in chunk.classes.items()}
        _check_layers(chunk, tensors, names)
        for given, tensor in tensors.items():
            kind = classes.get(given)
            for native, part in split_legacy_experts(given, tensor, rank, names):
                rule = names.find(native, rank, chunk.global_layers)
                yield _Parameter(
                    native=native,
                    tensor=part,
                    rule=classified(native, rule, rank, kind),
                    glu_interleave=chunk.glu_interleave if _GROUPED.search(given) else None,
                )


def _parameter_boxes(
    rank: MegatronRank, names: MegatronNames, parameter: _Parameter, made: MadeTensors
) -> Iterator[SourceBox]:
    rule = parameter.rule
    if not rule.hf:
        return
    role = _role(parameter)
    index, count = _place(rank, role)
    shard = Shard(
        name=parameter.native,
        data=plain_view(parameter.native, parameter.tensor),
        index=index,
        count=count,
        glu_interleave=parameter.glu_interleave,
    )
    shapes = names.shapes(rule, shard)
    if rule.rows is Rows.QKV:
        shapes = with_output_gate(shard, shapes)
    for piece in _pieces(rule, role.cut, shard, shapes, names):
        data, name = piece.data, rule.hf[piece.part]
        is_made = rule.plus != 0 or rule.rows is Rows.STACKED_GATED
        if is_made:
            made.wait_for(data)
            values = data + rule.plus if rule.plus else data.flatten(-2)
            data = made.copy((rank.label, name, piece.start), values)
        yield SourceBox(
            name=name,
            global_shape=shapes[piece.part],
            start=piece.start,
            data=data,
            made=is_made,
        )


def _pieces(
    rule: Rule, cut: Cut, shard: Shard, shapes: Sequence[Shape], names: MegatronNames
) -> list[Piece]:
    if rule.rows is Rows.STACKED:
        return stacked_plain(shard, cut, shapes, rule.number)
    if rule.rows is Rows.STACKED_GATED:
        return [stacked_gated(shard, shapes, rule.number)]
    return cut_shard(rule.rows, cut, shard, shapes, names.heads(rule), names.segments(rule))


def _role(parameter: _Parameter) -> Role:
    if parameter.rule.role is None:
        raise SourceError(
            f"{parameter.native}: nothing says how it is cut: not its rule, and no module's class",
            remedy="give its MegatronRule a cut, or the chunk its classes",
        )
    return parameter.rule.role


def _place(rank: MegatronRank, role: Role) -> tuple[int, int]:
    """The rank's place in the group that cuts a parameter of this role, and the group's size."""
    if role.cut is Cut.REPLICATED:
        return 0, 1
    return rank.expert_place if role.is_expert else (rank.tp_rank, rank.tp_size)


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
    chunk: MegatronChunk, tensors: dict[str, torch.Tensor], names: MegatronNames
) -> None:
    matches = (_LAYER_PREFIX.match(native) for native in tensors)
    held = {int(match[1]) for match in matches if match}
    if held != set(range(len(chunk.global_layers))):
        raise SourceError(
            f"the chunk holds local layers {sorted(held)}, but global_layers has "
            f"{len(chunk.global_layers)} numbers: {list(chunk.global_layers)}",
            remedy="give global_layers one number per local layer, in order",
        )
    foreign = [layer for layer in chunk.global_layers if not 0 <= layer < names.num_layers]
    if foreign:
        raise SourceError(
            f"global layers {foreign} do not lie in the model's {names.num_layers} layers",
            remedy="count global layers from 0; check num_hidden_layers",
        )
