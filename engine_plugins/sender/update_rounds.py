"""How all engines of a sender come to have a version: in one phase, in two, or down a tree.

Every rank of the trainer takes part; the leading one speaks with the engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.errors import EnginePluginError, UpdateEndUnknownError
from engine_plugins.sender.engine_urls import refuse_hidden_feeders, refuse_one_engine_twice
from engine_plugins.sender.engines import EngineLink
from engine_plugins.sender.fleet import Fleet
from engine_plugins.sender.offer import TrainerOffer
from engine_plugins.sender.options import Ways
from engine_plugins.sender.publishing import Publishing
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.sender.rounds import Offer, Round, drive
from engine_plugins.sender.send_dtype import EngineDtypes
from engine_plugins.sender.tree_update import TreeUpdate
from engine_plugins.sender.two_phase import abort_all, aborted, commit_all, without_silent
from engine_plugins.weights.contract.report import UpdateReport

__all__ = ["UpdateRounds"]


class UpdateRounds:
    """The updates of one sender, of which each begins with `refresh`; `run` is collective.

    Args:
        ranks: of the trainer.
        fleet: the engines; more may be added later.
        ways: how the engines come by a version.
        offer: what this rank offers.
        model: facts of the trainer's HF config.
        dtypes: those that engines have asked for.
        again: collectively refreshes what is offered, under the same word, in the middle of an
            update.
        shown: a block that shows how far engines are, by their urls and a version.
    """

    def __init__(
        self,
        ranks: TrainerRanks,
        fleet: Fleet,
        ways: Ways,
        offer: TrainerOffer,
        *,
        model: Mapping[str, str | int | bool],
        dtypes: EngineDtypes,
        again: Callable[[int], None],
        shown: Callable[[Sequence[str], int], AbstractContextManager[None]],
    ) -> None:
        self._ranks, self._fleet, self._ways = ranks, fleet, ways
        self._publishing = Publishing(ranks, fleet, offer, ways.publish)
        self._mine, self._model, self._shown = offer, model, shown
        self._dtypes, self._again = dtypes, again
        self._word = 0
        self._told_apart: set[str] = set()

    def offer(self, word: int) -> bool:
        """Offer this rank's weights as they are now.

        Args:
            word: the version word of this update, the same on every rank.

        Returns:
            Whether memory has moved, so that engines must be told where it is.

        Raises:
            SourceError: a tensor that can no longer be offered.
        """
        self._word = word
        return self._mine.refresh(word)

    def outdate(self, places: Sequence[int]) -> None:
        """Note which ranks' memory has moved, by their places in the group."""
        self._publishing.outdate(places)

    def run(self, request: UpdateRequest) -> Round:
        """Have every engine take the version; what each answered.

        Raises:
            SettingsError: two urls lead to one engine, or with fan_out one to loopback and others
                elsewhere.
        """
        self._look_at_urls()
        if self._ways.two_phase:
            return self._in_two_phases(request)
        if self._ways.fan_out is not None:
            return self._down_a_tree(self._ways.fan_out, request)
        return self._in_one_phase(request)

    def _look_at_urls(self) -> None:
        """Once for every set of engines, by the leading rank."""
        urls = set(self._fleet.urls)
        if urls != self._told_apart:
            self._ranks.lead("telling the engines apart", self._tell_apart, None)
        self._told_apart = urls

    def _tell_apart(self) -> None:
        links = self._fleet.links
        if self._ways.fan_out is not None:
            refuse_hidden_feeders(links.values())
        if len(links) > 1:
            refuse_one_engine_twice(links.values())

    def _in_one_phase(self, request: UpdateRequest) -> Round:
        """Offer and update, and once more for engines that had forgotten us."""
        urls = list(self._fleet.urls)
        result = Round()
        for _ in range(2):
            offers = self._offers(urls, request, result)
            step = partial(self._drive, urls, offers, request)
            result = self._ranks.lead("updating the engines", step, Round).after(result)
            urls = result.forgotten
            self._forget(urls)
            if not urls:
                break
        return result.settled()

    def _in_two_phases(self, request: UpdateRequest) -> Round:
        """Have engines prepare, in a push write, then have those commit that have prepared."""
        deadline = time.monotonic() + request.timeout_s
        pushing = None
        try:
            prepared = self._in_one_phase(request)
            enough = len(prepared.reports) >= self._ways.needed(len(self._fleet.urls))
            if prepared.failures:
                give_up = without_silent if enough else aborted
                step = partial(give_up, self._fleet.links, prepared, request)
                prepared = self._ranks.lead("aborting the update", step, Round)
            if not enough:
                return prepared
            pushing = self._mine.push
            if pushing is not None:
                pushing.run(self._fleet, list(prepared.reports), deadline=deadline)
        except BaseException as error:  # an interrupt too: no engine must wait for a commit
            self._mine.withdraw()
            if self._ranks.leads:
                because = f"the trainer's ranks failed: {type(error).__name__}: {_said(error)}"
                ended = pushing is None or pushing.ended
                links = self._fleet.links.values()
                abort_all(links, request, because=because, writes_ended=ended)
            raise

        def commit() -> Round:
            with self._mine.withdrawn_on_error():
                return commit_all(self._fleet.links, prepared, request)

        return self._ranks.lead("committing the update", commit, Round)

    def _down_a_tree(self, arity: int, request: UpdateRequest) -> Round:
        """Offer to one engine, which feeds the others; to more only where that does not do."""
        update = TreeUpdate(self._fleet.links, arity, self._model, request)
        result = Round(roots=self._fleet.urls[:1])
        while roots := result.roots:
            offers = self._offers(roots, request, result)
            step = partial(self._drive_tree, update, roots, offers, request.version)
            result = self._ranks.lead("updating the engines", step, Round).after(result)
            self._forget(result.forgotten)
        return result

    def _forget(self, urls: Iterable[str]) -> None:
        for url in urls:
            if url in self._fleet.links:
                self._fleet.links[url].forget()

    def _offers(self, urls: Sequence[str], request: UpdateRequest, earlier: Round) -> list[Offer]:
        """Of all ranks, in the dtypes that the engines want.

        Raises:
            UpdateEndUnknownError: other dtypes are wanted than in earlier rounds of this update,
                and an engine of those may still read.
        """

        def ask(link: EngineLink, source_ids: Sequence[str]) -> Mapping[str, Sequence[str]]:
            with self._mine.withdrawn_on_error():
                return link.wanted(source_ids, self._model, request, self._ways.direction)

        links = [self._fleet.links[url] for url in urls if url in self._fleet.links]
        offers = self._publishing.offers(urls)
        while self._dtypes.connect(links, offers, ask):
            _refuse_while_read(earlier, urls)
            self._again(self._word)
            offers = self._publishing.offers(urls)
        return offers

    def _drive(self, urls: Sequence[str], offers: Sequence[Offer], request: UpdateRequest) -> Round:
        def step(link: EngineLink, source_ids: Sequence[str]) -> UpdateReport:
            if self._ways.two_phase:
                return link.prepare(source_ids, self._model, request, self._ways.direction)
            return link.update(source_ids, self._model, request)

        links = [self._fleet.links[url] for url in urls]
        with self._mine.withdrawn_on_error(), self._shown(urls, request.version):
            return drive(links, offers, step)

    def _drive_tree(
        self, update: TreeUpdate, roots: Sequence[str], offers: Sequence[Offer], version: int
    ) -> Round:
        with self._mine.withdrawn_on_error(), self._shown(self._fleet.urls, version):
            return update.round(roots, offers)


def _said(error: BaseException) -> str:
    return error.message if isinstance(error, EnginePluginError) else str(error)


def _refuse_while_read(earlier: Round, urls: Sequence[str]) -> None:
    """Slots are laid out anew for other dtypes: nobody may be reading what lies in them."""
    code = UpdateEndUnknownError.code
    reading = [url for url, failure in earlier.failures.items() if failure.code == code]
    if reading:
        raise UpdateEndUnknownError(
            f"of {list(urls)} one came again and wants other dtypes, while {reading} may still "
            "read what was cast before",
            remedy="update again once these engines answer, or without them",
        )
