"""An engine that joins between updates takes the present version from one that holds it.

The trainer's own memory is not read for it: nobody can know that it has not been written since the
update. An engine can say whether it still holds what it offers.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import msgspec

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.errors import EnginePluginError, SettingsError, UpdateFailedError
from engine_plugins.sender.engine_urls import refuse_hidden_feeders
from engine_plugins.sender.engines import EngineLink, failure_of, for_each_engine
from engine_plugins.sender.feeding import Feeder, FeederError, Reader
from engine_plugins.weights.contract.report import UpdateReport

__all__ = ["AddedEngines", "bring_up"]


class AddedEngines(msgspec.Struct, frozen=True, kw_only=True):
    """What `add_engines` came to; the same on every trainer rank."""

    version: int | None
    """That the engines of this sender hold; None before the first update."""
    reports: dict[str, UpdateReport] = {}
    """Of the engines that hold it too now, by url."""
    fed_by: dict[str, str] = {}
    """The engine whose memory each of these read."""
    waiting: dict[str, str] = {}
    """Why the others wait for the next update with the weights that they have, by url."""

    def __str__(self) -> str:
        brought = [f"{url} holds version {self.version}" for url in self.reports]
        waits = [f"{url} waits for the next update: {why}" for url, why in self.waiting.items()]
        return "; ".join([*brought, *waits])


def bring_up(
    links: Mapping[str, EngineLink],
    added: Sequence[str],
    holders: Sequence[str],
    version: int,
    *,
    model: Mapping[str, str | int | bool],
    timeout_s: float,
) -> AddedEngines:
    """Have engines read a version from others; never raises for an engine.

    Args:
        links: of all engines, by url.
        added: urls of those that join.
        holders: urls of those that have installed the version.
        version: what they hold; each is asked whether it still does.
        model: facts of the trainer's HF config.
        timeout_s: seconds that each may take.
    """
    feeders = {url: Feeder(links[url], version) for url in holders}
    fed_by: dict[str, str] = {}

    def join(link: EngineLink) -> UpdateReport:
        request = UpdateRequest(
            plan_id="",
            version=version,
            request_id=f"join-v{version}-{secrets.token_hex(8)}",
            timeout_s=timeout_s,
        )
        reader = Reader(link, model, request)
        at = added.index(link.url) % len(holders)  # so that several do not all read from one
        why: EnginePluginError = UpdateFailedError("no engine holds it")
        for url in [*holders[at:], *holders[:at]]:
            try:
                refuse_hidden_feeders([links[url], link])
                report = reader.read(feeders[url])
            except FeederError as error:
                why = error.error
            except SettingsError as error:
                why = error
            else:
                fed_by[link.url] = url
                return report
        raise why

    answers = for_each_engine([links[url] for url in added], join)
    reports = {url: each for url, each in answers.items() if isinstance(each, UpdateReport)}
    failed = {url: each for url, each in answers.items() if isinstance(each, EnginePluginError)}
    return AddedEngines(
        version=version,
        reports=reports,
        fed_by=fed_by,
        waiting={url: _why(links[url], error) for url, error in failed.items()},
    )


def _why(link: EngineLink, error: EnginePluginError) -> str:
    failure = failure_of(link, error)
    return f"no engine could feed it ({failure.code}: {failure.detail}); it holds {failure.holds}"
