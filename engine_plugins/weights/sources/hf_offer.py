"""What `from_hf` and `from_fsdp` are given, as a source: named once, looked at anew.

Everything that can be known to be wrong without an engine is refused here, before one is asked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.model_facts import model_facts
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.forms.merged_lora import MergedLora
from engine_plugins.weights.sources.forms.peft_model import base_model_of, has_adapters
from engine_plugins.weights.sources.hf_model import names_of_config, names_of_model
from engine_plugins.weights.sources.megatron.tied_heads import (
    TIED,
    checked_boxes,
    checked_choice,
    is_tied,
)
from engine_plugins.weights.sources.module_tensors import ModuleTensors
from engine_plugins.weights.sources.only import Only
from engine_plugins.weights.sources.remembered import KnownBoxes, Remembered
from engine_plugins.weights.sources.torch_source import HfWeights, hf_boxes, looked_at_anew

__all__ = ["HfOffer", "read_config"]

_NAME = re.compile(r"\w+(?:\.\w+)+")
_SHOWN = 3


class HfOffer:
    """A model or named tensors, and what a config says of them.

    Args:
        weights: see `WeightSender.from_hf`.
        config: the HF config, object or dict, or the path of its file or folder. None: the
            model's own, where a model is given.
        only: what is asked for; None for all.
        merge_lora: whether adapters that peft has put into a model are merged; see `MergedLora`.

    Attributes:
        merged: the model with adapters merged, where it has any.

    Raises:
        SourceError: neither a model nor named tensors; a path without a config; adapters to merge
            of what is no model.
    """

    def __init__(
        self,
        weights: HfWeights,
        config: object = None,
        *,
        only: Only | None = None,
        merge_lora: bool = False,
    ) -> None:
        self.merged: MergedLora | None = None
        self.config = read_config(config)
        self._look, self._names, own = looked_at_anew(weights), None, None
        if isinstance(weights, nn.Module):
            self._names, own = names_of_model(base_model_of(weights), self.config)
            if has_adapters(weights):
                self.merged = MergedLora(weights, merge=merge_lora)
                self._look = self.merged.tensors
        else:
            _refuse_merging(merge_lora)
        if self.config is None:
            self.config = own
        elif self._names is None:
            self._names = names_of_config(self.config)
        self._tied = is_tied(self.config, None)
        # A chosen part of a tied pair is judged by both.
        self._only = only if self._tied else None
        described = only if self._only is None else self._only.besides(TIED)
        describe = partial(hf_boxes, names=self._names, only=described)
        self._described = Remembered(self._look, describe)
        self._chosen: tuple[KnownBoxes, KnownBoxes] | None = None

    @property
    def facts(self) -> dict[str, str | int | bool]:
        """What engines compare with their own config."""
        return model_facts(self.config)

    def boxes(self) -> Sequence[SourceBox]:
        """This process's boxes under checkpoint names, as they are now.

        Raises:
            SourceError, UnsupportedError: see `hf_boxes`, `CheckpointNames.boxes` and
                `checked_choice`.
        """
        boxes = self._described()
        if self._only is None:
            return checked_boxes(boxes, tied=self._tied)
        if self._chosen is None or self._chosen[0] is not boxes:
            self._chosen = boxes, KnownBoxes(self._only.of(boxes))
        return checked_choice(self._chosen[1], boxes)

    def forget(self) -> None:
        """Hold on to no memory; the next `boxes` describes it anew."""
        self._chosen = None
        self._described.forget()
        if isinstance(self._look, ModuleTensors):
            self._look.forget()

    def in_own_words(self, text: str) -> str:
        """What to add to an engine's words about tensors, so that they can be found in the trainer.

        Args:
            text: an engine's; it speaks of tensors by their checkpoint names.
        """
        if self._names is None:
            return (
                "if these names are transformers' in memory, give from_hf the model itself or "
                "config=, by which they become the checkpoint's"
            )
        own = self._names.own_names()
        found = dict.fromkeys(name for name in _NAME.findall(text) if name in own)
        return "; ".join(f"{name} is the model's {own[name]}" for name in list(found)[:_SHOWN])


def _refuse_merging(merge_lora: bool) -> None:
    if merge_lora:
        raise SourceError(
            "merge_lora is for a model, and named tensors were given",
            remedy="give the peft model itself",
        )


def read_config(config: object) -> object:
    """A config as an object or dict; of a path, what its file says.

    Raises:
        SourceError: a path at which there is no config.
    """
    if not isinstance(config, str | os.PathLike):
        return config
    path = Path(config)
    try:
        found = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    except (OSError, ValueError) as error:
        raise SourceError(
            f"config is {str(config)!r}, and no config can be read there: {error}",
            remedy="give model.config, its dict, or the path of a checkpoint's folder",
        ) from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} holds no config", remedy="give a checkpoint's config.json")
    return found
