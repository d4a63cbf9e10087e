"""What engines' urls tell beforehand: one engine named twice, one that others cannot reach."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

import httpx

from engine_plugins.admin_answers import EngineState
from engine_plugins.errors import EnginePluginError, SettingsError
from engine_plugins.sender.engines import EngineLink, for_each_engine

__all__ = ["refuse_hidden_feeders", "refuse_one_engine_twice"]

_PORTS = {"http": 80, "https": 443}


def refuse_one_engine_twice(links: Iterable[EngineLink]) -> None:
    """Compare what engines say of their workers, of those whose urls lead to one address.

    Only these are asked. A gateway may tell engines apart by their names, so an address is no
    proof, and what does not answer is not compared.

    Raises:
        SettingsError: two urls lead to one engine.
    """
    seen: dict[tuple[object, ...], str] = {}
    states = for_each_engine(_at_one_address(links), lambda link: link.client.state())
    for url, state in states.items():
        if isinstance(state, EnginePluginError) or not state.workers:
            continue
        other = seen.setdefault(_identity(state), url)
        if other != url:
            raise SettingsError(
                f"{other} and {url} are one engine: its workers are the same processes",
                remedy="name each engine once",
            )


def refuse_hidden_feeders(links: Iterable[EngineLink]) -> None:
    """Refuse loopback among other addresses, where engines read each other's memory.

    An engine listens on the network that its url names, so those elsewhere could not reach it.

    Raises:
        SettingsError: it names the engines on loopback.
    """
    hidden = {link.url: _is_loopback(link.host) for link in links}
    if len(set(hidden.values())) > 1:
        named = ", ".join(url for url, yes in hidden.items() if yes)
        raise SettingsError(
            f"with fan_out engines read each other's memory, and those elsewhere cannot reach "
            f"{named}",
            remedy="name every engine by an address that the others reach",
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _at_one_address(links: Iterable[EngineLink]) -> list[EngineLink]:
    """The links that share an address, a port and a path with another one."""
    places: dict[tuple[str, int, str], dict[str, EngineLink]] = {}
    for link in links:
        url = httpx.URL(link.url)
        port = url.port or _PORTS[url.scheme]
        for address in _addresses(url.host, port):
            places.setdefault((address, port, url.path), {})[link.url] = link
    shared = [place for place in places.values() if len(place) > 1]
    return list({url: link for place in shared for url, link in place.items()}.values())


def _addresses(host: str, port: int) -> set[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {str(target[0]) for *_, target in found}


def _identity(state: EngineState) -> tuple[object, ...]:
    """Pids alone repeat in containers that share their host's name; times to the µs do not."""
    workers = tuple((str(each.get("host")), str(each.get("pid"))) for each in state.workers)
    return (state.since, *workers)
