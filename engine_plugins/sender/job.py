"""What is behind a `WeightSender`: its ranks, its engines, what it offers, and one update."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial

import msgspec

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.errors import SettingsError, SourceError, UpdateEndUnknownError
from engine_plugins.sender.access import EngineAccess
from engine_plugins.sender.fleet import Engines, Fleet, named_urls
from engine_plugins.sender.interrupted import warn_of_interrupted
from engine_plugins.sender.joining import AddedEngines, bring_up
from engine_plugins.sender.megatron_job import Place, check_topology
from engine_plugins.sender.offer import TrainerOffer
from engine_plugins.sender.options import SenderOptions, Ways
from engine_plugins.sender.progress import progress_of
from engine_plugins.sender.push_report import PushReport
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.sender.recipes import Recipe, of_part
from engine_plugins.sender.report import EnginesFailedError, SenderReport
from engine_plugins.sender.rounds import Round, checked
from engine_plugins.sender.send_dtype import EngineDtypes
from engine_plugins.sender.sent_forms import SentForms
from engine_plugins.sender.update_rounds import UpdateRounds
from engine_plugins.weights.contract.version_word import new_word

__all__ = ["Job"]


class Job:
    """One sender's work; what `WeightSender` documents is not said again here.

    The ranks meet first: whatever fails after that on one of them is told to all.

    Args:
        recipe: works out what is sent.
        engines: base urls; of ranks that do not speak with engines they are not looked at.
        options: see `SenderOptions`.

    Attributes:
        offer: what this process offers.
    """

    def __init__(
        self, recipe: Callable[[], Recipe], engines: Engines, options: SenderOptions
    ) -> None:
        self._access = EngineAccess.of(options)
        self._progress = options.get("progress")
        self._ways = Ways.of(options)
        self._rounds: UpdateRounds | None = None
        self._under_way: int | None = None
        """The version that engines are taking at this moment."""
        self._held: tuple[int, list[str]] | None = None
        """The version of the last update, and the engines that took it."""
        self._ranks = TrainerRanks(
            options.get("process_group"), meet_timeout_s=self._ways.first_wait_s
        )
        speaks = self._ranks.leads or self._ways.publish == "each_rank"
        self._fleet = Fleet(self._access, speaks=speaks)
        self._closing = ExitStack()
        """Each is closed, last first, whatever the others raise."""
        self._closing.callback(self._ranks.close)
        self._closing.callback(self._fleet.close)
        try:
            with self._ranks.together("making the sender"):
                read = partial(self._read, recipe, options)
                self._ranks.agree("reading the model", read, list[Place], judge=_one_topology)
                self._choose(lambda: [box.name for box in self._recipe.boxes()])
                named = partial(named_urls, engines, self._access)
                urls = self._ranks.lead("naming the engines", named, list[str])
                register = partial(self._open, urls)
                self._ranks.agree("registering the weights", register, int, judge=_some_bytes)
        except BaseException:  # an interrupt too must leave nothing registered
            self.close()
            raise

    def update(self, ask: Callable[[], UpdateRequest]) -> SenderReport:
        """One update of all engines; `ask` says what is asked of each, and may raise."""
        self._open_rounds()
        with self._ranks.together("updating"):
            result, report = self._update(ask)
        if len(result.reports) < self._ways.needed(len(self._fleet.urls)):
            raise EnginesFailedError(
                version=report.version,
                failures=self._recipe.told(result.failures),
                reports=result.reports,
                fed_by=result.fed_by,
                require=self._ways.require,
            )
        return report

    def add_engines(self, engines: Engines, timeout_s: float) -> AddedEngines:
        """Take engines in, and have them read the present version from others."""

        def bring_up_added() -> AddedEngines:
            return self._bring_up(urls, timeout_s)

        self._open_rounds()
        with self._ranks.together("adding engines"):
            urls = self._ranks.lead("adding engines", partial(self._new, engines), list[str])
            self._ranks.agree("adding engines", partial(self._fleet.add, urls), None)
            added = self._ranks.lead("bringing engines up", bring_up_added, AddedEngines)
        if self._held is not None:
            version, holders = self._held
            self._held = version, [*holders, *added.reports]
        return added

    def remove_engines(self, engines: Engines) -> None:
        """Let engines go."""
        self._open_rounds()
        with self._ranks.together("removing engines"):
            urls = self._ranks.lead("removing engines", partial(self._known, engines), list[str])
            self._ranks.agree("removing engines", partial(self._fleet.remove, urls), None)
        if self._held is not None:
            version, holders = self._held
            self._held = version, [url for url in holders if url not in urls]

    def release(self) -> None:
        """Let go of this process's memory until the next update."""
        self.offer.release()

    def close(self) -> None:
        """Take everything back; repeating it does nothing."""
        under_way, self._rounds = self._under_way, None
        self._closing.close()
        if under_way is not None:  # by another thread
            self._warn(under_way)

    def _update(self, ask: Callable[[], UpdateRequest]) -> tuple[Round, SenderReport]:
        def begin() -> tuple[int, int]:
            self._ways.check_engines(len(self._fleet.urls))
            asked.append(checked(ask()))
            # Before any slot is filled: an agent that is made anew lets go of them all.
            self.offer.reach(self._fleet.hosts)
            return asked[0].version, new_word()

        asked: list[UpdateRequest] = []
        # Also the barrier: nothing is copied or read while a rank still computes its step.
        told = self._ranks.agree(
            "starting the update", begin, tuple[int, int], judge=_one_version, between_steps=True
        )
        word = told[0][1]
        started = time.perf_counter()
        self._gather()
        self._refresh(word)
        result = self._run(msgspec.structs.replace(asked[0], source_word=word))
        if result.reports:
            self._held = asked[0].version, list(result.reports)
        # The leading rank's clock, so that the report is the same everywhere.
        seconds = self._ranks.lead("timing", lambda: time.perf_counter() - started, float)
        return result, SenderReport.of(
            asked[0].version,
            result.reports,
            result.plans,
            seconds,
            fed_by=result.fed_by,
            push=None if self.offer.push is None else PushReport.of(self.offer.push.costs),
            failures=result.failures,
            slot_bytes=self._forms.slot_bytes,
        )

    def _run(self, request: UpdateRequest) -> Round:
        """Have the engines take the weights; afterwards no engine reads what it may install."""
        self._under_way = request.version
        try:
            result = self._open_rounds().run(request)
        except BaseException:  # Ctrl-C too: engines may be reading
            self._revoke()
            self._warn(request.version)
            raise
        finally:
            self._under_way = None
        unknown = UpdateEndUnknownError.code
        if any(failure.code == unknown for failure in result.failures.values()):
            self._revoke()
        else:
            self.offer.withdraw()
            if self._ways.register == "every_update":
                self._ranks.agree("letting go of the memory", self.offer.release, None)
        return result

    def _revoke(self) -> None:
        """Take the memory back, and let no thread that still speaks with an engine go on."""
        self.offer.close()
        self._fleet.renew()

    def _warn(self, version: int) -> None:
        if self._ranks.leads:
            warn_of_interrupted(self._fleet.urls, self._access, version)

    def _new(self, engines: Engines) -> list[str]:
        urls = named_urls(engines, self._access)
        known = [url for url in urls if url in self._fleet.urls]
        if known:
            raise SettingsError(
                f"engines were given before: {known}", remedy="add only those that are new"
            )
        return urls

    def _known(self, engines: Engines) -> list[str]:
        urls = named_urls(engines, self._access)
        unknown = [url for url in urls if url not in self._fleet.urls]
        if unknown:
            raise SettingsError(
                f"this sender has no engines {unknown}",
                remedy=f"name some of those that it has: {self._fleet.urls}",
            )
        return urls

    def _bring_up(self, urls: Sequence[str], timeout_s: float) -> AddedEngines:
        version, holders = self._held or (None, [])
        if version is None or not holders:
            why = (
                "no version was sent before"
                if version is None
                else f"no engine is left that took version {version}, and the trainer's memory may "
                "have been written since"
            )
            return AddedEngines(version=version, waiting=dict.fromkeys(urls, why))
        return bring_up(
            self._fleet.links,
            urls,
            holders,
            version,
            model=self._recipe.model,
            timeout_s=timeout_s,
        )

    def _gather(self) -> None:
        """Gather what the optimizer left to the next forward pass.

        Every rank looks before any gathers: one that refuses would leave the others waiting.
        """
        gathers = self._recipe.gathers
        if gathers is None:
            return
        found: list[Callable[[], None]] = []
        look = partial(gathers, self._ranks.members)
        self._ranks.agree("looking at the parameters", lambda: found.extend(look()), None)
        self._ranks.agree("gathering the parameters", lambda: _call_all(found), None)

    def _refresh(self, word: int) -> None:
        """Offer the weights as they are now; once more if the engines want other dtypes."""
        rounds = self._open_rounds()

        def offer() -> tuple[bool, int]:
            moved = rounds.offer(word)
            return moved, self.offer.source.copied_bytes

        moved = self._forms.refresh(offer)
        rounds.outdate(moved)
        if moved:
            self._choose(lambda: self.offer.source.manifest.tensors.names)

    def _read(self, recipe: Callable[[], Recipe], options: SenderOptions) -> list[Place]:
        """Work out what is sent."""
        self._ways.check()
        self._recipe = of_part(recipe(), options)
        self._forms = SentForms(
            self._recipe.boxes,
            self._ranks,
            quantization=self._recipe.form,
            send_dtype=options.get("send_dtype", "engine"),
            merged=self._recipe.merged,
        )
        self.offer = TrainerOffer(
            self._forms.boxes,
            self._ranks,
            model=self._recipe.model,
            transport=options.get("transport"),
            partial=self._recipe.only is not None,
            pushes=self._ways.direction == "push",
            let_go=self._forms.release,
        )
        self.offer.lets_go_of(self._recipe.forget)
        self._closing.callback(self.offer.close)
        return list(self._recipe.places())

    def _choose(self, names: Callable[[], Collection[str]]) -> None:
        """Refuse a pattern of `only` that matches none of these names on any rank."""
        only = self._recipe.only
        if only is not None:
            self._ranks.agree(
                "choosing tensors",
                lambda: only.idle(names()),
                list[str],
                judge=only.refuse_idle,
            )

    def _open(self, urls: Sequence[str]) -> int:
        """Register, and say how many bytes are offered."""
        self._fleet.add(urls)
        self.offer.reach(self._fleet.hosts)
        self.offer.open()
        offered = self.offer.source.nbytes
        if self._ways.register == "every_update":
            self.offer.release()
        self._rounds = UpdateRounds(
            self._ranks,
            self._fleet,
            self._ways,
            self.offer,
            model=self._recipe.model,
            dtypes=EngineDtypes(self._ranks, self._forms.dtypes),
            again=self._refresh,
            shown=partial(progress_of, access=self._access, shown=self._progress),
        )
        return offered

    def _open_rounds(self) -> UpdateRounds:
        if self._rounds is None:
            raise SourceError("this sender is closed", remedy="make a new one")
        return self._rounds


def _some_bytes(offered: Sequence[int]) -> None:
    """A rank may have nothing to offer, where another one has gathered all."""
    if not any(offered):
        raise SourceError(
            "no tensors given, on any rank (a generator that was used up?)",
            remedy="give the model itself, or a function that gives its named tensors",
        )


def _one_version(told: Sequence[tuple[int, int]]) -> None:
    asked = [version for version, _ in told]
    if len(set(asked)) > 1:
        raise SettingsError(
            f"the trainer's ranks ask for different versions: {asked}",
            remedy="name the same version on every rank",
        )


def _one_topology(told: Sequence[Sequence[Place]]) -> None:
    check_topology([place for told_by_one in told for place in told_by_one])


def _call_all(steps: Sequence[Callable[[], None]]) -> None:
    for step in steps:
        step()
