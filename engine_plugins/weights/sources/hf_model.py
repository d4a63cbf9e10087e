"""A transformers model as a source: its tensors as boxes of what `save_pretrained` would write.

Names, renames, splits and fused experts come from transformers' own tables (`conversion_trace`),
so every family that it can save is offered as engines read it, in place. Of a model that is not
transformers' the names are taken as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.boxes.model_facts import model_facts
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.conversion_trace import Piece, Undo, traced_pieces
from engine_plugins.weights.sources.only import Only
from engine_plugins.weights.sources.text_tower import Renamed, other_model, tower_names
from engine_plugins.weights.sources.wrapper_names import plain_name, unwrapped

__all__ = ["CheckpointNames", "names_of_config", "names_of_model", "transformers_model"]

_SHOWN = 4
_NOT_SAVED = "_keys_to_ignore_on_save"


def transformers_model(model: nn.Module) -> tuple[str, Any] | None:
    """The transformers model within a module, and the path to it without wrappers.

    Raises:
        SourceError: several side by side.
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return None
    found: list[tuple[str, nn.Module]] = []
    for path, module in unwrapped(model).named_modules():
        within = any(path.startswith(f"{outer}.") or not outer for outer, _ in found)
        if isinstance(module, library.PreTrainedModel) and not within:
            found.append((path, module))
    if len(found) > 1:
        raise SourceError(
            f"the module holds several models: {', '.join(path for path, _ in found)}",
            remedy="give the one that the engine serves",
        )
    return (plain_name(found[0][0]), found[0][1]) if found else None


def names_of_model(model: nn.Module, config: object = None) -> tuple[CheckpointNames | None, Any]:
    """How a module's tensors are called in checkpoints, and its config; None: as they are.

    Args:
        model: the trainer's.
        config: of what the engine serves, if it is given. Where that is a model of several parts
            and the trainer's is its text, or the other way round, the names are the engine's.

    Raises:
        SourceError: several models side by side.
    """
    found = transformers_model(model)
    if found is None:
        return None, getattr(unwrapped(model), "config", None)
    path, inner = found
    served = other_model(inner, config)
    renamed = None if served is None else tower_names(inner, served)
    saved: Any = inner if renamed is None else served
    names = CheckpointNames(
        lambda: _conversions(saved),
        saved.config,
        prefix=f"{path}." if path else "",
        not_saved=getattr(saved, _NOT_SAVED, None) or (),
        renamed=renamed,
    )
    return names, saved.config


def names_of_config(config: object) -> CheckpointNames | None:
    """How tensors of a config's model are called in checkpoints, if transformers knows the family.

    Tensors that have their checkpoint names already keep them.

    Args:
        config: the HF config, object or dict.
    """
    family = model_facts(config).get("model_type")
    try:
        from transformers import CONFIG_MAPPING
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return None
    if family not in CONFIG_MAPPING:
        return None
    own: Any = SimpleNamespace(**config) if isinstance(config, Mapping) else config
    keys = (*(getattr(own, "architectures", None) or ()), family)
    return CheckpointNames(
        lambda: next(filter(None, map(get_checkpoint_conversion_mapping, keys)), []), own
    )


class CheckpointNames:
    """Turns boxes of a model's tensors into boxes of its checkpoint's.

    What becomes of which tensor is found out once, and again when names or shapes change.

    Args:
        conversions: gives what transformers does to tensors that it loads.
        config: the HF config.
        prefix: of the model's names, where a module holds it.
        not_saved: names that its checkpoints lack.
        renamed: what the model's names are in the model whose conversions these are, if that is
            another; None where it has no such tensor.
    """

    def __init__(
        self,
        conversions: Callable[[], list[Any]],
        config: Any,
        *,
        prefix: str = "",
        not_saved: Iterable[str] = (),
        renamed: Renamed | None = None,
    ) -> None:
        self._conversions = conversions
        self._config = config
        self._prefix = prefix
        self._not_saved = frozenset(not_saved)
        self._renamed = renamed
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self._others: list[str] = []

    def boxes(self, own: Sequence[SourceBox], *, only: Only | None = None) -> list[SourceBox]:
        """Replace boxes of the model's tensors by boxes of the checkpoint's; no value is copied.

        Args:
            own: under the model's names without wrappers; of a sharded tensor this rank's share.
            only: what is asked for; None for all. The rest may be what cannot be offered.

        Raises:
            SourceError: tensors beside the model's.
            UnsupportedError: a conversion that puts elements in another order, or splits an axis
                that is sharded.
        """
        outside = [box.name for box in own if not box.name.startswith(self._prefix)]
        if outside and only is None:
            raise SourceError(
                f"{', '.join(outside[:_SHOWN])}: no part of the model at {self._prefix[:-1]!r}, "
                "and the engine has nothing like it",
                remedy=f"give the model alone (the module's attribute {self._prefix[:-1]!r}), or "
                "choose its tensors with only=",
            )
        self._look({box.name: box.global_shape for box in own})
        others = [name for name in self._others if only is None or only.chooses(name)]
        if others:
            raise UnsupportedError(
                f"{', '.join(others[:_SHOWN])}: transformers holds them in another order than "
                "checkpoints do, so they cannot be read where they lie",
                remedy="leave them out with only=, if they are not trained; or give from_hf a "
                "function that gives the tensors as save_pretrained would write them",
            )
        made = [made for box in own for made in self._made_of(box)]
        return made if only is None else list(only.of(made))

    def own_names(self) -> dict[str, str]:
        """Checkpoint name -> the model's, of all that are called otherwise."""
        return {
            piece.name: own
            for own, pieces in self._pieces.items()
            for piece in pieces
            if piece.name != own
        }

    def _saved(self, name: str) -> str | None:
        """The name of a tensor where conversions are concerned; None if it is not saved."""
        inner: str | None = name.removeprefix(self._prefix)
        if self._renamed is not None and inner is not None:
            inner = self._renamed(inner)
        saved = name.startswith(self._prefix) and inner not in self._not_saved
        return inner if saved else None

    def _look(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes == self._shapes:
            return
        own = {saved: name for name in shapes if (saved := self._saved(name)) is not None}
        inner = {saved: shapes[name] for saved, name in own.items()}
        pieces, self._others = traced_pieces(inner, _undo(self._conversions(), self._config))
        self._pieces = {own[saved]: found for saved, found in pieces.items()}
        self._shapes = shapes

    def _made_of(self, box: SourceBox) -> Iterator[SourceBox]:
        for piece in self._pieces.get(box.name, ()):
            try:
                cut = piece.view.cut(box.start, box.data)
            except ValueError as error:
                raise UnsupportedError(
                    f"{box.name}: this rank's share of {box.global_shape} cannot be offered as "
                    f"{piece.name} {piece.shape}: {error}",
                    remedy="shard it along its first axis, or not at all",
                ) from error
            if cut is not None:
                start = tuple(a + b for a, b in zip(cut[0], piece.start, strict=True))
                yield SourceBox(name=piece.name, global_shape=piece.shape, start=start, data=cut[1])


def _undo(conversions: list[Any], config: Any) -> Undo:
    """What transformers does to a model's tensors before it saves them."""
    if not conversions:
        return lambda tensors: tensors
    from transformers.core_model_loading import revert_weight_conversion

    def undo(tensors: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        stand_in: Any = SimpleNamespace(
            _weight_conversions=conversions, config=config, get_parameter=tensors.__getitem__
        )
        made: Mapping[str, torch.Tensor] = revert_weight_conversion(stand_in, dict(tensors))
        return made

    return undo


def _conversions(model: Any) -> list[Any]:
    """Those by which a model was loaded, else those that transformers has for its family.

    Of a checkpoint in the model's own format none was used; engines read the family's.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange
    except ImportError:  # transformers 4 saves what it holds
        return []
    used = list(getattr(model, "_weight_conversions", None) or ())
    if not used:
        known = get_model_conversion_mapping(model, add_legacy=False)
        # Whether a prefix was there can be told from a load alone.
        used = [each for each in known if not isinstance(each, PrefixChange)]
    for conversion in used:
        if conversion.scope_prefix:
            conversion.scope_prefix = plain_name(conversion.scope_prefix)
    return used
