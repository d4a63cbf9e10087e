"""The engines of one sender: every rank knows their urls, and those who speak HTTP have links."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import httpx

from engine_plugins.errors import SettingsError
from engine_plugins.sender.access import EngineAccess
from engine_plugins.sender.engines import EngineLink

__all__ = ["Engines", "Fleet", "named_urls"]

Engines = str | Sequence[str] | None
"""Base urls, `http://host:8000`. Ranks that speak with no engine may give None."""


class Fleet:
    """Engines, in the order in which they were named.

    Args:
        access: how they are spoken to.
        speaks: whether this process speaks with engines at all; if not, no client is made.

    Attributes:
        urls: of all engines; the same on every rank.
        links: this process's, by url; of one that does not speak there are none.
    """

    def __init__(self, access: EngineAccess, *, speaks: bool) -> None:
        self._access, self._speaks = access, speaks
        self.urls: list[str] = []
        self.links: dict[str, EngineLink] = {}

    @property
    def hosts(self) -> list[str]:
        """Names or addresses of the engines' hosts, as their urls have them."""
        return [httpx.URL(url).host for url in self.urls]

    def add(self, urls: Iterable[str]) -> None:
        """Take engines in, by the urls that `named_urls` gave.

        Raises:
            SettingsError: files for TLS that cannot be used.
        """
        urls = list(urls)
        if self._speaks:
            self.links |= {url: EngineLink(self._access.client(url)) for url in urls}
        self.urls += urls

    def remove(self, urls: Iterable[str]) -> None:
        """Let engines go; what they hold stays theirs."""
        for url in urls:
            self.urls.remove(url)
            link = self.links.pop(url, None)
            if link is not None:
                link.client.close()

    def renew(self) -> None:
        """Let no thread that still speaks with an engine go on, and forget what each said."""
        for url, link in list(self.links.items()):
            link.client.close()
            self.links[url] = EngineLink(self._access.client(url))

    def close(self) -> None:
        """Close every connection."""
        with ExitStack() as stack:
            for link in self.links.values():
                stack.callback(link.client.close)


def named_urls(engines: Engines, access: EngineAccess) -> list[str]:
    """The urls that a caller named, as engines are known by.

    Raises:
        SettingsError: no engine, one twice, a url that is none, or TLS files of no use.
    """
    given: object = [engines] if isinstance(engines, str) else engines
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise SettingsError(
            f"engines is {engines!r}, on the rank that speaks with them",
            remedy="give their base urls, http://host:port",
        )
    by_url: dict[str, list[str]] = {}
    for each in given:
        with access.client(each) as client:
            by_url.setdefault(client.url, []).append(each)
    twice = [f"{url} (as {' and '.join(as_)})" for url, as_ in by_url.items() if len(as_) > 1]
    if twice or not by_url:
        raise SettingsError(
            f"engines must name each engine once, and names {', '.join(twice) or 'none'}",
            remedy="give each engine's base url once",
        )
    return list(by_url)
