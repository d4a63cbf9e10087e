"""Which route a request will run, known before its body is read.

The routes of the application are asked themselves, so what is found here is what its router runs:
a table of paths beside the router would read some paths otherwise than the router does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

__all__ = ["RouteKey", "RouteTable", "oddity_of_path"]

RouteKey = tuple[str, str]
"""A method, and a path as the route declares it."""

_ODDITIES = {
    "a control character": re.compile(rb"[\x00-\x20\x7f]|%[01][0-9a-f]|%7f", re.IGNORECASE),
    "an encoded slash": re.compile(rb"%2f|%5c|\\", re.IGNORECASE),
    "a doubled slash": re.compile(rb"//"),
}


class RouteTable:
    """The routes of one application.

    Args:
        routes: in the order in which the application's router asks them.
    """

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = routes

    def find(self, scope: Scope) -> RouteKey | None:
        """The route that this request will run; `None` if the router has none for it."""
        for route in self._routes:
            match, _ = route.matches({**scope})
            if match is Match.FULL:
                return (scope["method"], route.path) if isinstance(route, Route) else None
        return None

    def methods_at(self, scope: Scope) -> list[str]:
        """Methods under which the path of this request has a route, sorted."""
        found: set[str] = set()
        for route in self._routes:
            if isinstance(route, Route) and route.matches({**scope})[0] is not Match.NONE:
                found |= route.methods or set()
        # HEAD is answered wherever GET is, by the layer in front of the routes.
        return sorted(found | ({"HEAD"} if "GET" in found else set()))


def oddity_of_path(scope: Scope) -> str | None:
    """What no path of ours has and a router may read in several ways, in words; `None` if nothing.

    Both forms of the path are looked at: as it was sent, and as the server has decoded it. The root
    path in front of them is the operator's; with a final slash, it makes a doubled one.
    """
    sent, decoded = scope.get("raw_path") or b"", scope["path"].encode("utf-8", "surrogateescape")
    root = scope.get("app_root_path", "").encode("utf-8", "surrogateescape")
    forms = decoded.removeprefix(root), sent.removeprefix(root)
    return next((what for what, odd in _ODDITIES.items() if any(map(odd.search, forms))), None)
