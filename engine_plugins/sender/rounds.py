"""One round of an update: every rank offers its manifest, the leading rank drives the engines.

A second round follows for engines that no longer knew what they had been told, as after a
restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.errors import EnginePluginError, SettingsError, UnknownIdError
from engine_plugins.sender.engines import EngineLink, failure_of, for_each_engine, forgot_us
from engine_plugins.sender.report import EngineFailure
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport

__all__ = ["Offer", "Round", "checked", "drive", "publish_to"]

MAX_TIMEOUT_S = 3600.0
"""Of one update; half of what trainer ranks wait for each other."""


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What one trainer rank has from each engine: its source_id, or why it has none."""

    source_ids: dict[str, str] = {}
    failures: dict[str, EngineFailure] = {}


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """What the engines answered, by url; each is in one of the first three."""

    reports: dict[str, UpdateReport] = {}
    failures: dict[str, EngineFailure] = {}
    forgotten: list[str] = []
    plans: dict[str, PlanSummary] = {}
    fed_by: dict[str, str] = {}
    """Where engines feed each other: whose memory each has read."""
    roots: list[str] = []
    """Where engines feed each other: those that the trainer has to feed in the next round."""

    def after(self, earlier: Round) -> Round:
        """Both rounds as one; what was forgotten earlier has an answer here."""
        failures = earlier.failures | self.failures
        reports = earlier.reports | self.reports
        return Round(
            reports={url: report for url, report in reports.items() if url not in failures},
            failures=failures,
            plans=earlier.plans | self.plans,
            fed_by=earlier.fed_by | self.fed_by,
            forgotten=self.forgotten,
            roots=self.roots,
        )

    def settled(self) -> Round:
        """Count an engine that forgot us again as failed: asking once more would not help."""
        lost = EngineFailure(
            code=UnknownIdError.code,
            detail="it did not know the sources that it had accepted a moment before",
            remedy="give each server's own url, not that of a load balancer",
            holds="the weights it had",
        )
        failures = self.failures | dict.fromkeys(self.forgotten, lost)
        return msgspec.structs.replace(self, failures=failures, forgotten=[])


def publish_to(
    links: Sequence[EngineLink],
    packed: Mapping[int, bytes | bytearray | memoryview],
    *,
    whose: Sequence[int],
) -> dict[str, EngineFailure]:
    """Give ranks' manifests to every engine that has not got them; never raises for an engine.

    Args:
        links: the engines.
        packed: by the ranks' places; see `EngineLink.publish`.
        whose: the same ranks as the trainer calls them, for errors.

    Returns:
        The engines that did not take them, by url.
    """
    failures: dict[str, EngineFailure] = {}
    answers = for_each_engine(links, lambda link: link.publish(packed))
    for link in links:
        answer = answers[link.url]
        if isinstance(answer, EnginePluginError):
            ranks = f"rank {whose[0]}" if len(whose) == 1 else f"ranks {whose[0]} to {whose[-1]}"
            manifests = "manifest" if len(whose) == 1 else "manifests"
            where = f"the {manifests} of trainer {ranks}: "
            failures[link.url] = failure_of(link, answer, where=where)
    return failures


def drive(
    links: Sequence[EngineLink],
    offers: Sequence[Offer],
    step: Callable[[EngineLink, Sequence[str]], UpdateReport],
) -> Round:
    """Take a step with every engine that all ranks have offered to.

    Args:
        links: the engines.
        offers: what each rank has from them.
        step: given an engine and the ids of its sources: update it, say.
    """
    result = Round()
    for offer in reversed(offers):  # of several ranks' failures, the first rank's is told
        result.failures.update(offer.failures)

    def with_ids(link: EngineLink) -> UpdateReport:
        ids = [offer.source_ids[link.url] for offer in offers if link.url in offer.source_ids]
        return step(link, ids)

    answers = for_each_engine([link for link in links if link.url not in result.failures], with_ids)
    for link in links:
        answer = answers.get(link.url)
        if forgot_us(answer):
            result.forgotten.append(link.url)
        elif isinstance(answer, EnginePluginError):
            result.failures[link.url] = failure_of(link, answer)
        elif answer is not None:
            result.reports[link.url] = answer
            if link.plan is not None:
                result.plans[link.url] = msgspec.structs.replace(link.plan, destinations=[])
    return result


def checked(request: UpdateRequest) -> UpdateRequest:
    """Check what a trainer may get wrong before any engine is asked.

    Raises:
        SettingsError: a version or a timeout that cannot be.
    """
    if request.version < 0 or not 0 < request.timeout_s <= MAX_TIMEOUT_S:
        raise SettingsError(
            f"version {request.version} with timeout_s {request.timeout_s:g} cannot be",
            remedy=f"a version is at least 0, a timeout above 0 and at most {MAX_TIMEOUT_S:g} s",
        )
    return request
