"""What a sender sends, by the kind of model that it is made from.

A recipe is worked out once the trainer's ranks have met, so that what fails in it on one rank is
told to all: each function here may raise anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from torch import nn

from engine_plugins.errors import SettingsError, SourceError, WeightMismatchError
from engine_plugins.sender.megatron_job import MegatronRanks, Place, gathers_of, ranks_of
from engine_plugins.sender.options import SenderOptions
from engine_plugins.sender.report import EngineFailure
from engine_plugins.weights.boxes.model_facts import model_facts
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.forms.block_fp8 import BlockFp8
from engine_plugins.weights.sources.forms.merged_lora import MergedLora
from engine_plugins.weights.sources.hf_offer import HfOffer, read_config
from engine_plugins.weights.sources.megatron.offer import MegatronOffer
from engine_plugins.weights.sources.megatron.registry import GivenRules
from engine_plugins.weights.sources.only import Only
from engine_plugins.weights.sources.torch_source import HfWeights

__all__ = ["Boxes", "Gathers", "Recipe", "of_boxes", "of_fsdp", "of_hf", "of_megatron", "of_part"]

Boxes = Callable[[], Sequence[SourceBox]]
Gathers = Callable[[Collection[int]], Sequence[Callable[[], None]]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One process's part of what a sender sends.

    Attributes:
        boxes: gives this process's boxes anew for every update.
        model: facts that engines compare with their own config; see `model_facts`.
        places: gives the place of every rank of a larger job that this process plays; see
            `check_topology`.
        gathers: gives, from the global ranks of all trainer processes, what to call before every
            update so that this process's tensors are those of the last step.
        forget: has `boxes` hold on to no memory until it is asked again.
        form: of what is offered, where it is not what the trainer holds.
        only: the part of the model that is sent; None for all of it.
        merged: what adapters are merged into.
        in_own_words: what to add to an engine's words about tensors; see `HfOffer`.
    """

    boxes: Boxes
    model: Mapping[str, str | int | bool]
    places: Callable[[], Sequence[Place]] = tuple
    gathers: Gathers | None = None
    forget: Callable[[], None] = lambda: None
    form: BlockFp8 | None = None
    merged: MergedLora | None = None
    only: Only | None = None
    in_own_words: Callable[[str], str] = lambda text: ""

    def told(self, failures: Mapping[str, EngineFailure]) -> dict[str, EngineFailure]:
        """Engines' failures, with what the trainer calls the tensors that do not fit."""
        return {
            url: self._told(each) if each.code == WeightMismatchError.code else each
            for url, each in failures.items()
        }

    def _told(self, failure: EngineFailure) -> EngineFailure:
        words = self.in_own_words(failure.detail)
        detail = f"{failure.detail} ({words})" if words else failure.detail
        return msgspec.structs.replace(failure, detail=detail)


def of_part(recipe: Recipe, options: SenderOptions) -> Recipe:
    """The recipe, of the tensors that the options choose."""
    only = recipe.only or _only(options)
    if only is None:
        return recipe
    if options.get("fan_out") is not None:
        raise SettingsError(
            "with fan_out engines feed each other whole models, so none can be sent a part",
            remedy="leave out fan_out, or only",
        )
    if recipe.only is not None:  # and its boxes are chosen
        return recipe
    boxes = recipe.boxes
    return replace(recipe, boxes=lambda: only.of(boxes()), only=only)


def _only(options: SenderOptions) -> Only | None:
    patterns = options.get("only")
    return None if patterns is None else Only(patterns)


def of_boxes(
    boxes: Boxes, model: Mapping[str, str | int | bool] | None, options: SenderOptions
) -> Recipe:
    """Any source of boxes."""
    return Recipe(boxes=boxes, model=dict(model or {}), form=_form(options, None))


def of_hf(
    weights: HfWeights, config: object, options: SenderOptions, *, merge_lora: bool = False
) -> Recipe:
    """An HF model, or HF-named tensors; see `WeightSender.from_hf`."""
    only = _only(options)
    offer = HfOffer(weights, config, only=only, merge_lora=merge_lora)
    return Recipe(
        boxes=offer.boxes,
        model=offer.facts,
        gathers=None if offer.merged is None else offer.merged.gathers,
        forget=offer.forget,
        form=_form(options, offer.config),
        merged=offer.merged,
        only=only,
        in_own_words=offer.in_own_words,
    )


def of_fsdp(
    model: nn.Module, config: object, options: SenderOptions, *, merge_lora: bool = False
) -> Recipe:
    """What this process holds of an FSDP2 model; see `WeightSender.from_fsdp`."""
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"a {type(model).__name__} is no model",
            remedy="give the module that fully_shard was called on; named tensors go to from_hf",
        )
    return of_hf(model, config, options, merge_lora=merge_lora)


def of_megatron(
    ranks: MegatronRanks, config: Any, rules: GivenRules | None, options: SenderOptions
) -> Recipe:
    """What this process holds of a Megatron model; see `WeightSender.from_megatron`."""
    config = read_config(config)
    offer = MegatronOffer(partial(ranks_of, ranks), ranks, config, rules)
    return Recipe(
        boxes=offer.boxes,
        forget=offer.forget,
        model=model_facts(config),
        places=lambda: [(rank.label, rank.topology) for rank in ranks_of(ranks)],
        gathers=lambda members: gathers_of(ranks, members),
        form=_form(options, config),
    )


def _form(options: SenderOptions, config: object) -> BlockFp8 | None:
    """The form that the options name, or that the model's config speaks of."""
    form = options.get("quantization")
    return BlockFp8.of_config(config) if form == "fp8" else form
