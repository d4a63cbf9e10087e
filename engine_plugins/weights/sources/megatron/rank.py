"""What one Megatron rank holds: its chunks' native parameters and its coordinates."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn

from engine_plugins.errors import NotConfiguredError, SourceError
from engine_plugins.weights.sources.megatron.classes import class_name
from engine_plugins.weights.sources.megatron.config import check_options, glu_interleave
from engine_plugins.weights.sources.megatron.gather import check_gathering

__all__ = ["MegatronChunk", "MegatronRank", "strip_wrappers"]

_WRAPPERS = re.compile(r"(?:module\.)+")
_LAYER_MODULE = re.compile(r"decoder\.layers\.(\d+)")


def strip_wrappers(name: str) -> str:
    """A native name without the `module.` prefixes of DDP and mixed-precision wrappers."""
    match = _WRAPPERS.match(name)
    return name[match.end() :] if match else name


@dataclass(frozen=True, kw_only=True, eq=False)
class MegatronChunk:
    """One virtual-pipeline chunk of one rank.

    Of a chunk built by hand nothing is known but its tensors. Whoever builds it sees to it that
    before every update they hold what the last step made: with the distributed optimizer and
    `overlap_param_gather` call `start_param_sync(force_sync=True)` of the DDP wrapper, on every
    rank. And that no option of the model changes their layout, `glu_interleave` apart.

    Attributes:
        tensors: native local name (`decoder.layers.0.mlp.linear_fc1.weight`, `module.`
            prefixes allowed) -> the trainer's own tensor. `_extra_state` entries may be
            there; they are never read.
        global_layers: for each local layer, its number in the whole model, from 0. Empty
            for a chunk without transformer layers. Multi-token prediction layers have none.
        classes: native local name -> name of the class of the module that holds the parameter,
            which says how it is cut. A parameter that is not there is cut as its name says.
        glu_interleave: Megatron's `moe_mlp_glu_interleave_size`: grouped experts keep so many
            rows of gate and of up by turns. None or 0: all of gate before all of up.
        module: the module that the chunk was read from. Its parameters are gathered before every
            update, and it says whether an output layer is a copy of the embedding.
    """

    tensors: Mapping[str, torch.Tensor]
    global_layers: Sequence[int]
    classes: Mapping[str, str] = field(default_factory=dict)
    glu_interleave: int | None = None
    module: nn.Module | None = None

    @classmethod
    def from_module(cls, module: nn.Module) -> MegatronChunk:
        """Read a real Megatron model chunk: parameters, persistent buffers, layers, classes.

        Raises:
            SourceError: a decoder layer without `layer_number`, or layers not 0, 1, 2...
            UnsupportedError: an option of the model or of its wrapper with which its parameters
                cannot be read where they lie, or lie in an unknown order.
        """
        check_options(module)
        check_gathering(module)
        layers: dict[int, int] = {}
        for name, sub in module.named_modules():
            match = _LAYER_MODULE.fullmatch(strip_wrappers(name))
            if match is None:
                continue
            number = getattr(sub, "layer_number", None)
            if not isinstance(number, int):
                raise SourceError(
                    f"{name}: a {type(sub).__name__} has no layer_number, so its place in the "
                    "whole model is unknown",
                    remedy="use megatron.core transformer layers, or build MegatronChunk by hand",
                )
            layers[int(match[1])] = number - 1
        if sorted(layers) != list(range(len(layers))):
            raise SourceError(
                f"the chunk's decoder layers are numbered {sorted(layers)}, not from 0 on",
                remedy="build MegatronChunk by hand",
            )
        tensors = dict(_tensors(module))
        modules = dict(module.named_modules(remove_duplicate=False))
        return cls(
            tensors=tensors,
            global_layers=[layers[local] for local in range(len(layers))],
            classes={name: class_name(modules[name.rpartition(".")[0]]) for name in tensors},
            glu_interleave=glu_interleave(module),
            module=module,
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers: what a checkpoint would hold, less extra state."""
    yield from module.named_parameters(remove_duplicate=False)
    for prefix, sub in module.named_modules(remove_duplicate=False):
        for name, buffer in sub.named_buffers(recurse=False, remove_duplicate=False):
            if name not in sub._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


@dataclass(frozen=True, kw_only=True, eq=False)
class MegatronRank:
    """One Megatron process's share of the model.

    Attributes:
        chunks: its model chunks, one without a virtual pipeline.
        tp_rank, tp_size: tensor-parallel place and size; they cut the dense parameters.
        pp_rank, pp_size: pipeline place and size, for messages alone: what a stage holds
            is read off its chunks.
        ep_rank, ep_size: expert-parallel place and size.
        etp_rank, etp_size: tensor-parallel place and size of the experts; None as for the
            dense parameters, which is Megatron's default.
        class_cuts: for module classes of your own, how they cut: class name -> "column", "row"
            or "replicated". It wins over what is known of a class.

    Raises:
        SourceError: a place outside its group.
    """

    chunks: Sequence[MegatronChunk]
    tp_rank: int
    tp_size: int
    pp_rank: int = 0
    pp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int | None = None
    etp_size: int | None = None
    class_cuts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.etp_rank is None) != (self.etp_size is None):
            raise SourceError(
                f"etp_rank {self.etp_rank} and etp_size {self.etp_size}: one without the other",
                remedy="give both or none",
            )
        for axis in ("tp", "pp", "ep", "etp"):
            place, size = getattr(self, f"{axis}_rank"), getattr(self, f"{axis}_size")
            if place is not None and not 0 <= place < size:
                raise SourceError(
                    f"{axis}_rank {place} does not lie in {axis}_size {size}",
                    remedy="give the rank's place in its group, from 0",
                )

    @property
    def expert_place(self) -> tuple[int, int]:
        """Place and size in the experts' tensor-parallel group."""
        if self.etp_rank is None or self.etp_size is None:
            return self.tp_rank, self.tp_size
        return self.etp_rank, self.etp_size

    @property
    def topology(self) -> str:
        """The size of every group, which all ranks of a job must have alike."""
        etp_size = self.expert_place[1]
        return f"tp {self.tp_size}, pp {self.pp_size}, ep {self.ep_size}, etp {etp_size}"

    @property
    def label(self) -> str:
        """The rank's place, for messages."""
        dense = f"tp {self.tp_rank}/{self.tp_size}, pp {self.pp_rank}/{self.pp_size}"
        if self.ep_size == 1 and self.expert_place == (self.tp_rank, self.tp_size):
            return dense
        place, size = self.expert_place
        return f"{dense}, ep {self.ep_rank}/{self.ep_size}, etp {place}/{size}"

    @classmethod
    def from_model(
        cls,
        model_chunks: Sequence[nn.Module],
        *,
        tp_rank: int | None = None,
        tp_size: int | None = None,
        pp_rank: int | None = None,
        pp_size: int | None = None,
        ep_rank: int | None = None,
        ep_size: int | None = None,
        etp_rank: int | None = None,
        etp_size: int | None = None,
        class_cuts: Mapping[str, str] | None = None,
    ) -> MegatronRank:
        """Read real Megatron model chunks, wrapped in DDP and Float16Module or not.

        Layer numbers are each layer's `layer_number - 1`. Each coordinate that is not given is
        asked of `megatron.core.parallel_state`. Where Megatron has no groups, tp_rank and tp_size
        must be given, and of the others both or none: none for a group of one, and for experts
        cut as the dense parameters are.

        Raises:
            NotConfiguredError: a coordinate that must be given, and Megatron is not installed or
                has not initialised its groups.
            SourceError: a chunk that cannot be read, or a place outside its group.
            UnsupportedError: as for `MegatronChunk.from_module`.
        """
        chunks = [MegatronChunk.from_module(chunk) for chunk in model_chunks]
        given = {
            "tp_rank": tp_rank,
            "tp_size": tp_size,
            "pp_rank": pp_rank,
            "pp_size": pp_size,
            "ep_rank": ep_rank,
            "ep_size": ep_size,
            "etp_rank": etp_rank,
            "etp_size": etp_size,
        }
        return cls(chunks=chunks, class_cuts=class_cuts or {}, **_completed(given))


_GROUPS = {
    "tp": "tensor_model_parallel",
    "pp": "pipeline_model_parallel",
    "ep": "expert_model_parallel",
    "etp": "expert_tensor_parallel",
}


def _completed(given: Mapping[str, int | None]) -> dict[str, int]:
    """The coordinates given, and what Megatron's groups say of the others."""
    said = {name: value for name, value in given.items() if value is not None}
    missing = [axis for axis in _GROUPS if len({f"{axis}_rank", f"{axis}_size"} - said.keys())]
    needed = [
        axis for axis in missing if axis == "tp" or {f"{axis}_rank", f"{axis}_size"} & said.keys()
    ]
    state = _parallel_state(needed)
    for axis in missing if state else ():
        group = _GROUPS[axis]
        said.setdefault(f"{axis}_rank", int(getattr(state, f"get_{group}_rank")()))
        said.setdefault(f"{axis}_size", int(getattr(state, f"get_{group}_world_size")()))
    return said


def _parallel_state(needed: Sequence[str]) -> ModuleType | None:
    """Megatron's groups; None where there are none, and no axis is in need of them.

    A model of Megatron's own was built with Megatron imported, so it is not imported in vain.
    """
    remedy = f"pass {' and '.join(f'{axis}_rank and {axis}_size' for axis in needed)}"
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None and needed:
        try:
            state = importlib.import_module("megatron.core.parallel_state")
        except ImportError as error:
            raise NotConfiguredError(
                "megatron.core is not installed, so the rank's coordinates are unknown",
                remedy=remedy,
            ) from error
    if state is None or state.model_parallel_is_initialized():
        return state
    if needed:
        raise NotConfiguredError(
            "megatron.core.parallel_state has no groups yet",
            remedy=f"call initialize_model_parallel first, or {remedy}",
        )
    return None
