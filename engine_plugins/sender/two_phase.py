"""An update of all engines or of none: nobody commits unless everybody has prepared.

The leading rank drives it. Engines that wait for a commit that never comes give up by themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

import msgspec

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.errors import EnginePluginError, UpdateAbortedError, UpdateEndUnknownError
from engine_plugins.sender.engines import SILENT_S, EngineLink, failure_of, for_each_engine
from engine_plugins.sender.report import EngineFailure
from engine_plugins.sender.rounds import Round
from engine_plugins.weights.contract.report import UpdateReport

__all__ = ["abort_all", "aborted", "commit_all"]

logger = logging.getLogger(__name__)

ABORT_S = 8.0
"""For one engine to let what is under way end, and give up what it prepared."""


def commit_all(links: Mapping[str, EngineLink], prepared: Round, request: UpdateRequest) -> Round:
    """Have every engine install what it prepared.

    Args:
        links: the engines by url.
        prepared: every engine's answer to prepare; those that failed stay failed.
        request: what was prepared.
    """
    result = msgspec.structs.replace(prepared, reports={}, failures=dict(prepared.failures))
    answers = for_each_engine(
        [links[url] for url in prepared.reports], lambda link: link.commit(request)
    )
    for url, answer in answers.items():
        if isinstance(answer, EnginePluginError):
            result.failures[url] = failure_of(links[url], answer)
        else:
            result.reports[url] = answer
    return result


def aborted(links: Mapping[str, EngineLink], prepared: Round, request: UpdateRequest) -> Round:
    """Have every engine that prepared give up, because another one did not prepare.

    Returns:
        A round in which every engine has failed.
    """
    others = ", ".join(prepared.failures)
    perhaps = _perhaps_prepared(prepared)
    failures = abort_all(
        (links[url] for url in [*prepared.reports, *perhaps]),
        request,
        because=f"it had prepared and was told to abort: {others} could not prepare",
        writes_ended=True,
        silent=perhaps,
    )
    return msgspec.structs.replace(prepared, reports={}, failures=failures | prepared.failures)


def without_silent(
    links: Mapping[str, EngineLink], prepared: Round, request: UpdateRequest
) -> Round:
    """Go on without the engines that did not prepare; none of them may wait for a commit.

    Returns:
        The same round.
    """
    perhaps = _perhaps_prepared(prepared)
    because = "it gave no answer to prepare, and the others go on without it"
    abort_all(
        (links[url] for url in perhaps),
        request,
        because=because,
        writes_ended=True,
        silent=perhaps,
    )
    return prepared


def _perhaps_prepared(prepared: Round) -> list[str]:
    """Engines of which that is not known: they may have, and would wait for a commit."""
    unknown = UpdateEndUnknownError.code
    return [url for url, failure in prepared.failures.items() if failure.code == unknown]


def abort_all(
    links: Iterable[EngineLink],
    request: UpdateRequest,
    *,
    because: str,
    writes_ended: bool,
    silent: Collection[str] = (),
) -> dict[str, EngineFailure]:
    """Have engines give up what they prepared; say what each holds then.

    Args:
        links: the engines.
        request: what was prepared.
        because: why, for people.
        writes_ended: of a push, whether no rank's write is under way.
        silent: urls of engines whose answer is hardly waited for, since they have just given none.
            What each of them holds is not asked.
    """

    def abort(link: EngineLink) -> UpdateReport:
        # An engine that does not answer gives up by itself, by the update's own deadline.
        client = link.client.hurried(SILENT_S if link.url in silent else ABORT_S)
        return client.abort(request.request_id, writes_ended=writes_ended)

    links = list(links)
    answers = for_each_engine(links, abort)
    failures: dict[str, EngineFailure] = {}
    for link in (link for link in links if link.url not in silent):
        answer = answers[link.url]
        if isinstance(answer, EnginePluginError):
            failure = failure_of(link, answer, where=f"{because}; the abort failed: ")
        else:
            failure = failure_of(link, UpdateAbortedError(because))
        failures[link.url] = failure
        logger.warning("%s: %s (it holds %s)", link.url, failure.detail, failure.holds)
    return failures
