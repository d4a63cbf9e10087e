"""What dtypes the engines want, asked when they are connected, before anything is installed.

The leading rank asks; every rank learns of it and casts into slots. An engine that wants a tensor
in another dtype than an engine before it is refused: both would be offered the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from engine_plugins.errors import EnginePluginError, WeightMismatchError
from engine_plugins.sender.engines import EngineLink, failure_of, for_each_engine, forgot_us
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.sender.report import EngineFailure
from engine_plugins.sender.rounds import Offer
from engine_plugins.weights.boxes.dtypes import dtype_named
from engine_plugins.weights.sources.forms.cast import SentDtypes

__all__ = ["EngineDtypes"]

_SHOWN = 4

Wanted = Mapping[str, Sequence[str]]
"""By dtype, the names of tensors."""


class _Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What the leading rank learned from connecting engines."""

    wanted: dict[str, list[str]] = {}
    """By dtype, tensors that are to be sent in it from now on."""
    failures: dict[str, EngineFailure] = {}
    """Why engines cannot be connected, by url."""


class EngineDtypes:
    """The dtypes that a sender's engines have asked for.

    Args:
        ranks: of the trainer.
        dtypes: what this rank casts by; taught here.
    """

    def __init__(self, ranks: TrainerRanks, dtypes: SentDtypes) -> None:
        self._ranks, self._dtypes = ranks, dtypes
        self._asked: dict[str, tuple[str, str]] = {}
        """On the leading rank: by tensor, the dtype and the url of who wants it so."""

    def connect(
        self,
        links: Sequence[EngineLink],
        offers: Sequence[Offer],
        ask: Callable[[EngineLink, Sequence[str]], Wanted],
    ) -> bool:
        """Connect engines to what was offered, and learn what they want instead; collective.

        Args:
            links: the engines.
            offers: what each rank has from them. Who cannot be connected is noted in the first.
            ask: connects one engine to its sources, and gives what it wants in other dtypes.

        Returns:
            Whether tensors go in other dtypes from now on, and must be offered anew.
        """
        if not self._dtypes.learns:
            return False
        answers = self._ranks.lead(
            "connecting the engines", lambda: self._answers(links, offers, ask), _Answers
        )
        if offers:  # on the leading rank, or where each rank publishes
            offers[0].failures.update(answers.failures)
        if not answers.wanted:
            return False
        self._dtypes.learn(
            {name: dtype_named(dtype) for dtype, names in answers.wanted.items() for name in names}
        )
        return True

    def _answers(
        self,
        links: Sequence[EngineLink],
        offers: Sequence[Offer],
        ask: Callable[[EngineLink, Sequence[str]], Wanted],
    ) -> _Answers:
        lost = {url for offer in offers for url in offer.failures}

        def asked(link: EngineLink) -> Wanted:
            ids = [offer.source_ids[link.url] for offer in offers if link.url in offer.source_ids]
            return ask(link, ids)

        met = [link for link in links if link.url not in lost]
        told = for_each_engine(met, asked)
        answers, before = _Answers(), dict(self._asked)
        for link in met:
            answer = told[link.url]
            if forgot_us(answer):
                continue  # the update asks once more
            try:
                if isinstance(answer, EnginePluginError):
                    raise answer
                new = self._agreed(link.url, answer, before)
            except EnginePluginError as error:
                answers.failures[link.url] = failure_of(link, error)
                continue
            for dtype, names in new.items():
                answers.wanted.setdefault(dtype, []).extend(names)
        return answers

    def _agreed(
        self, url: str, wanted: Wanted, before: Mapping[str, tuple[str, str]]
    ) -> dict[str, list[str]]:
        """What of an engine's wishes is new; all of them are noted, or none.

        Raises:
            WeightMismatchError: a tensor was asked for in another dtype, or was sent in this one.
        """
        found = [(name, dtype) for dtype, names in wanted.items() for name in names]
        others = [each for each in found if self._asked.get(each[0], each[1:])[0] != each[1]]
        if others:
            name, dtype = others[0]
            known, by = self._asked[name]
            more = f" (and {len(others) - 1} more tensors)" if len(others) > 1 else ""
            whose = "it wanted it" if by == url else f"{by} wants it"
            raise WeightMismatchError(
                f"{url} wants {name} in {dtype}{more}, and {whose} in {known}",
                remedy="update engines that hold their parameters in different dtypes with a "
                "sender each, or name one dtype that all of them take, by send_dtype; what an "
                "engine wanted before it was restarted or removed is kept: make a new sender",
            )
        kept = [name for name, _ in found if name in before]
        if kept:
            raise WeightMismatchError(
                f"{url} still wants other dtypes of what was cast for it: "
                f"{', '.join(kept[:_SHOWN])}",
                remedy="send them in the dtype that the engine's own checkpoint has, by "
                "send_dtype, or as they are, by send_dtype='as_is'",
            )
        new: dict[str, list[str]] = {}
        for name, dtype in found:
            if name not in self._asked:
                self._asked[name] = (dtype, url)
                new.setdefault(dtype, []).append(name)
        return new
