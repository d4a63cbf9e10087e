"""How all engines of a sender come to have a version: in one phase, in two, or down a tree.

Every rank of the trainer takes part; the leading one speaks with the engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.sender.engine_urls import refuse_hidden_feeders, refuse_one_engine_twice
from engine_plugins.sender.engines import EngineLink
from engine_plugins.sender.offer import TrainerOffer
from engine_plugins.sender.options import Ways
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.sender.rounds import Offer, Round, drive, offer_to
from engine_plugins.sender.send_dtype import EngineDtypes
from engine_plugins.sender.tree_update import TreeUpdate
from engine_plugins.sender.two_phase import abort_all, aborted, commit_all
from engine_plugins.weights.contract.report import UpdateReport

__all__ = ["UpdateRounds"]


class UpdateRounds:
    """The updates of one sender, of which each begins with `refresh`; `run` is collective.

    Args:
        ranks: of the trainer.
        links: the engines by url; more may be added later.
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
        links: Mapping[str, EngineLink],
        ways: Ways,
        offer: TrainerOffer,
        *,
        model: Mapping[str, str | int | bool],
        dtypes: EngineDtypes,
        again: Callable[[int], None],
        shown: Callable[[Sequence[str], int], AbstractContextManager[None]],
    ) -> None:
        self._ranks, self._links, self._ways = ranks, links, ways
        self._mine, self._model, self._shown = offer, model, shown
        self._dtypes, self._again = dtypes, again
        self._word = 0
        self._told_apart: set[str] = set()

    def refresh(self, word: int) -> None:
        """Offer the weights as they are now; if memory moved, engines are told where it is.

        Args:
            word: the version word of this update, the same on every rank.

        Raises:
            SourceError: a tensor that can no longer be offered; see also `TrainerOffer.reach`.
        """
        self._word = word
        self._mine.reach([link.host for link in self._links.values()])
        if self._mine.refresh(word):
            for link in self._links.values():
                link.forget()

    def run(self, request: UpdateRequest) -> Round:
        """Have every engine take the version; what each answered.

        Raises:
            SettingsError: two urls lead to one engine, or with fan_out one to loopback and others
                elsewhere.
        """
        if self._ways.fan_out is not None:
            refuse_hidden_feeders(self._links.values())
        self._tell_apart()
        if self._ways.two_phase:
            return self._in_two_phases(request)
        if self._ways.fan_out is not None:
            return self._down_a_tree(self._ways.fan_out, request)
        return self._in_one_phase(request)

    def _tell_apart(self) -> None:
        """Once for every set of engines, by the leading rank."""
        urls = set(self._links)
        if len(urls) > 1 and urls != self._told_apart:
            links = list(self._links.values())
            look = partial(refuse_one_engine_twice, links)
            self._ranks.agree(
                "telling the engines apart", look if self._ranks.leads else _nothing, None
            )
        self._told_apart = urls

    def _in_one_phase(self, request: UpdateRequest) -> Round:
        """Offer and update, and once more for engines that had forgotten us."""
        urls = list(self._links)
        result = Round()
        for _ in range(2):
            links = [self._links[url] for url in urls]
            offers = self._offers(links, request)
            step = partial(self._drive, links, offers, request)
            result = self._ranks.lead("updating the engines", step, Round).after(result)
            urls = result.forgotten
            for url in urls:
                self._links[url].forget()
            if not urls:
                break
        return result.settled()

    def _in_two_phases(self, request: UpdateRequest) -> Round:
        """Have every engine prepare, in a push write, then have every engine commit."""
        deadline = time.monotonic() + request.timeout_s
        pushing = None
        try:
            prepared = self._in_one_phase(request)
            if prepared.failures:
                step = partial(aborted, self._links, prepared, request)
                return self._ranks.lead("aborting the update", step, Round)
            pushing = self._mine.push
            if pushing is not None:
                pushing.run(self._links, deadline=deadline)
        except BaseException as error:  # an interrupt too: no engine must wait for a commit
            self._mine.withdraw()
            if self._ranks.leads:
                because = f"the trainer's ranks failed: {type(error).__name__}: {error}"
                ended = pushing is None or pushing.ended
                abort_all(self._links.values(), request, because=because, writes_ended=ended)
            raise

        def commit() -> Round:
            with self._mine.withdrawn_on_error():
                return commit_all(self._links, prepared, request)

        return self._ranks.lead("committing the update", commit, Round)

    def _down_a_tree(self, arity: int, request: UpdateRequest) -> Round:
        """Offer to one engine, which feeds the others; to more only where that does not do."""
        update = TreeUpdate(self._links, arity, self._model, request)
        result = Round(roots=list(self._links)[:1])
        while roots := result.roots:
            offers = self._offers([self._links[url] for url in roots], request)
            step = partial(self._drive_tree, update, roots, offers, request.version)
            result = self._ranks.lead("updating the engines", step, Round).after(result)
            for url in result.forgotten:
                self._links[url].forget()
        return result

    def _offers(self, links: Sequence[EngineLink], request: UpdateRequest) -> list[Offer]:
        """Of all ranks, in the dtypes that the engines want."""

        def ask(link: EngineLink, source_ids: Sequence[str]) -> Mapping[str, Sequence[str]]:
            with self._mine.withdrawn_on_error():
                return link.wanted(source_ids, self._model, request, self._ways.direction)

        offers = self._published(links)
        while self._dtypes.connect(links, offers, ask):
            self._again(self._word)
            offers = self._published(links)
        return offers

    def _published(self, links: Sequence[EngineLink]) -> list[Offer]:
        return self._ranks.agree("offering the weights", partial(self._offer, links), Offer)

    def _offer(self, links: Sequence[EngineLink]) -> Offer:
        source = self._mine.source
        if not source.manifest.tensors.names:
            return Offer()  # a rank may hold nothing: it has nothing to say
        return offer_to(links, lambda: source.manifest_bytes, trainer_rank=self._ranks.global_rank)

    def _drive(
        self, links: Sequence[EngineLink], offers: Sequence[Offer], request: UpdateRequest
    ) -> Round:
        def step(link: EngineLink, source_ids: Sequence[str]) -> UpdateReport:
            if self._ways.two_phase:
                return link.prepare(source_ids, self._model, request, self._ways.direction)
            return link.update(source_ids, self._model, request)

        shown = self._shown([link.url for link in links], request.version)
        with self._mine.withdrawn_on_error(), shown:
            return drive(links, offers, step)

    def _drive_tree(
        self, update: TreeUpdate, roots: Sequence[str], offers: Sequence[Offer], version: int
    ) -> Round:
        with self._mine.withdrawn_on_error(), self._shown(list(self._links), version):
            return update.round(roots, offers)


def _nothing() -> None:
    pass
