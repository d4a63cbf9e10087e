"""An update over a tree of engines: each engine that holds the version feeds others.

The leading rank drives it, in rounds: the trainer's ranks offer to some engines, and a round goes
on from these until no engine is left that another can feed.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.errors import EnginePluginError
from engine_plugins.sender.engines import EngineLink, failure_of, forgot_us
from engine_plugins.sender.fan_out import TRAINER, FanOutTree
from engine_plugins.sender.feeding import Feeder, FeederError, Reader
from engine_plugins.sender.report import EngineFailure
from engine_plugins.sender.rounds import Offer, Round
from engine_plugins.weights.contract.report import UpdateReport

__all__ = ["TreeUpdate"]

logger = logging.getLogger(__name__)

Outcome = UpdateReport | BaseException


class TreeUpdate:
    """One version on its way to every engine, over one tree.

    Args:
        links: the engines by url, the root first.
        arity: how many others an engine feeds, at least 1.
        model: facts of the trainer's HF config.
        request: the update, as the caller asked for it.
    """

    def __init__(
        self,
        links: Mapping[str, EngineLink],
        arity: int,
        model: Mapping[str, str | int | bool],
        request: UpdateRequest,
    ) -> None:
        self._links = links
        self._version = request.version
        self._tree = FanOutTree(list(links), arity)
        self._feeders = {url: Feeder(link, request.version) for url, link in links.items()}
        self._readers = {url: Reader(link, model, request) for url, link in links.items()}
        self._answers: queue.SimpleQueue[tuple[str, Outcome]] = queue.SimpleQueue()
        self._under_way = 0
        self._forgot: set[str] = set()

    def round(self, roots: Sequence[str], offers: Sequence[Offer]) -> Round:
        """Feed some engines from the trainer, and from these whatever engines can feed.

        Args:
            roots: urls of engines that every rank has offered to.
            offers: what each rank has from them.

        Returns:
            What the engines answered; `roots` names those that the trainer has to feed next.
        """
        result = Round()
        for url in roots:
            failed = next((o.failures[url] for o in offers if url in o.failures), None)
            if failed is None:
                self._tree.begin(url, TRAINER)
                self._start(url, [o.source_ids[url] for o in offers if url in o.source_ids])
            else:
                self._fail(result, url, failed)
        while self._under_way:
            url, outcome = self._answers.get()
            self._under_way -= 1
            self._settle(result, url, outcome)
            while (feed := self._tree.next_feed()) is not None:
                self._start(feed[0])
        result.fed_by.update(self._tree.fed_by)
        result.roots.extend(self._tree.roots())
        return result

    def _start(self, url: str, source_ids: Sequence[str] = ()) -> None:
        """Feed an engine in a thread; a daemon, so that Ctrl-C does not wait for it."""
        self._under_way += 1

        def run() -> None:
            try:
                self._answers.put((url, self._fed(url, source_ids)))
            except BaseException as error:  # a thread may not end without its answer
                self._answers.put((url, error))

        threading.Thread(target=run, daemon=True, name=f"update {url}").start()

    def _fed(self, url: str, source_ids: Sequence[str]) -> UpdateReport:
        reader, feeder = self._readers[url], self._tree.fed_by[url]
        if feeder == TRAINER:
            return reader.read_trainer(source_ids)
        return reader.read(self._feeders[feeder])

    def _settle(self, result: Round, url: str, outcome: Outcome) -> None:
        link = self._links[url]
        if isinstance(outcome, UpdateReport):
            self._tree.installed(url)
            result.reports[url] = outcome
            if link.plan is not None:
                result.plans[url] = link.plan
        elif isinstance(outcome, FeederError):
            self._blame(result, self._tree.fed_by[url], outcome)
            self._tree.try_another(url)
        elif not isinstance(outcome, EnginePluginError):
            raise outcome
        elif forgot_us(outcome) and url not in self._forgot:
            self._forgot.add(url)
            self._tree.try_another(url)
            result.forgotten.append(url)
        else:
            self._fail(result, url, failure_of(link, outcome))

    def _blame(self, result: Round, feeder: str, error: FeederError) -> None:
        """Take out a feeder that is gone, and ask nothing more of one that cannot feed."""
        logger.warning("%s fed nobody: %s", feeder, error)
        if error.gone:
            where = f"it installed version {self._version} and was lost afterwards: "
            self._fail(result, feeder, failure_of(self._links[feeder], error.error, where=where))
        elif error.useless:
            self._tree.retire(feeder)

    def _fail(self, result: Round, url: str, failure: EngineFailure) -> None:
        self._tree.failed(url)
        result.failures[url] = failure
