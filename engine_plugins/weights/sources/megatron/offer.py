"""What `from_megatron` is given, as a source: described anew when something in it has moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import nn

from engine_plugins.weights.boxes.model_facts import model_facts
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.megatron.made import MadeTensors
from engine_plugins.weights.sources.megatron.names import HfConfig
from engine_plugins.weights.sources.megatron.rank import MegatronRank
from engine_plugins.weights.sources.megatron.registry import GivenRules
from engine_plugins.weights.sources.megatron.source import megatron_boxes_of
from engine_plugins.weights.sources.module_tensors import ModuleTensors
from engine_plugins.weights.sources.remembered import Remembered

__all__ = ["MegatronOffer"]


class MegatronOffer:
    """One process's share of a Megatron model.

    Args:
        ranks: reads the shares anew.
        parts: what they are read from, itself looked at anew: model chunks, or shares that were
            built by hand.
        config: the HF config that the engines serve, object or dict.
        rules: see `register_family`.
    """

    def __init__(
        self,
        ranks: Callable[[], Sequence[MegatronRank]],
        parts: MegatronRank | Sequence[MegatronRank] | Sequence[nn.Module],
        config: HfConfig,
        rules: GivenRules | None,
    ) -> None:
        self._parts = parts
        self._looks: dict[nn.Module, ModuleTensors] = {}
        self._ranks, self._config, self._rules = ranks, config, rules
        self._described = Remembered(self._look, lambda _: self._describe())
        self._made = MadeTensors()
        # The values of a tied model's head are compared in every update, and copies are filled.
        self._always_anew = model_facts(config).get("tie_word_embeddings") is not False

    def boxes(self) -> Sequence[SourceBox]:
        """This process's boxes as they are now.

        Raises:
            EnginePluginError: see `megatron_boxes` and `MegatronRank.from_model`.
        """
        if self._always_anew:
            return self._describe()
        boxes = self._described()
        self._always_anew = any(box.made for box in boxes)
        return boxes

    def forget(self) -> None:
        """Hold on to no memory; the next `boxes` describes it anew."""
        self._described.forget()
        self._looks.clear()

    def _describe(self) -> list[SourceBox]:
        return megatron_boxes_of(self._ranks(), self._config, self._rules, self._made)

    def _look(self) -> list[tuple[str, torch.Tensor]]:
        given: list[MegatronRank | nn.Module] = (
            [self._parts] if isinstance(self._parts, MegatronRank) else [*self._parts]
        )
        looks, self._looks = self._looks, {}
        found: list[Iterable[tuple[str, torch.Tensor]]] = []
        for part in given:
            if isinstance(part, MegatronRank):
                found += [list(chunk.tensors.items()) for chunk in part.chunks]
            else:
                self._looks[part] = looks.get(part) or ModuleTensors(part, _tensors)
                found.append(self._looks[part]())
        return list(chain(*found))


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
