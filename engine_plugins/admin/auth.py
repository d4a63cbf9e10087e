"""Who may call which route: bearer tokens with scopes, read before anything else.

This is ASGI in front of the routes, not a dependency of them: a request without a right token is
answered before its body is read, however large or malformed it is. The scope that counts is that of
the route which the router will run; a request that no route will take is refused here.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from starlette.types import ASGIApp, Receive, Scope, Send

from engine_plugins.admin.error_responses import problem
from engine_plugins.admin.route_table import RouteKey, RouteTable, oddity_of_path
from engine_plugins.errors import SettingsError
from engine_plugins.settings import PREFIX, Settings

__all__ = ["BearerAuth", "TokenBook", "TokenScope"]

TokenScope = Literal["read", "control", "weights"]
ALL_SCOPES: frozenset[TokenScope] = frozenset(get_args(TokenScope))
_SEE_DOCUMENT = "GET /admin/v1/openapi.json lists the routes"


@dataclass(frozen=True, kw_only=True)
class _Entry:
    token: bytes = field(repr=False)
    scopes: frozenset[TokenScope]


class TokenBook:
    """The tokens of this server: one for everything, or a file of `scope token` lines."""

    def __init__(self, settings: Settings) -> None:
        self._single = settings.admin_token
        self._file = settings.admin_token_file
        self._stamp: tuple[int, int, int] | None = None
        self._from_file: list[_Entry] = []

    def scopes_of(self, token: str) -> frozenset[TokenScope] | None:
        """Scopes of a token, or None if nobody has it. Takes as long for any token."""
        offered = token.encode()
        granted: frozenset[TokenScope] | None = None
        for entry in self.entries():
            if hmac.compare_digest(entry.token, offered):
                granted = (granted or frozenset()) | entry.scopes
        return granted

    def entries(self) -> list[_Entry]:
        """Every token known now; the file is read again when it has changed.

        Raises:
            SettingsError: the file cannot be read or has a line that makes no sense.
        """
        single = (
            [] if not self._single else [_Entry(token=self._single.encode(), scopes=ALL_SCOPES)]
        )
        if self._file is None:
            return single
        try:
            stat = self._file.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if stamp != self._stamp:
                self._from_file = _read_token_file(self._file)
                self._stamp = stamp
        except OSError as error:
            raise SettingsError(
                f"{PREFIX}ADMIN_TOKEN_FILE: {self._file} cannot be read ({error.strerror})"
            ) from error
        return single + self._from_file


def _read_token_file(path: Path) -> list[_Entry]:
    entries = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] not in ALL_SCOPES:
            raise SettingsError(
                f"{path}, line {number}: not `scope token` with scope "
                f"{', '.join(sorted(ALL_SCOPES))}"
            )
        scope: TokenScope = words[0]
        entries.append(_Entry(token=words[1].encode(), scopes=frozenset({scope})))
    return entries


class BearerAuth:
    """Lets a request through to `app` only with a token whose scopes allow its route.

    Args:
        app: the admin application.
        tokens: who may do what.
        routes: the routes of `app`.
        scopes: the scope that each route needs; one that needs `None` takes any valid token, and
            one that is not named is closed.
        state_name: the engine's state, which those with a token are told.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: TokenBook,
        *,
        routes: RouteTable,
        scopes: Mapping[RouteKey, TokenScope | None],
        state_name: Callable[[], str],
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._routes = routes
        self._scopes = scopes
        self._state_name = state_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no route of ours is one
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        try:
            configured = bool(self._tokens.entries())
        except SettingsError as error:
            return problem(503, "not_configured", error.message, remedy="mend the token file")
        if not configured:
            return problem(
                503,
                "not_configured",
                "this server has no admin token, so its admin routes are closed",
                remedy=f"start it with {PREFIX}ADMIN_TOKEN or {PREFIX}ADMIN_TOKEN_FILE set",
            )
        granted = self._tokens.scopes_of(_bearer(scope))
        if granted is None:
            return problem(
                401,
                "unauthorized",
                "no token, or not one of this server's",
                remedy="send `Authorization: Bearer <token>`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return self._forbidden(scope, granted)

    def _forbidden(self, scope: Scope, granted: frozenset[TokenScope]) -> ASGIApp | None:
        """The answer to a request that its token does not allow, or that no route takes."""
        if odd := oddity_of_path(scope):
            return self._unknown(f"the path of this request has {odd}; no admin route has one")
        route = self._routes.find(scope)
        if route is None or route not in self._scopes:
            return self._no_route(scope)
        needed = self._scopes[route]
        if needed is None or needed in granted:
            return None
        return problem(
            403,
            "forbidden",
            f"this route needs a token of scope {needed}; yours has {', '.join(sorted(granted))}",
            remedy="use another token",
            state=self._state_name(),
        )

    def _no_route(self, scope: Scope) -> ASGIApp:
        methods = self._routes.methods_at(scope)
        if methods:
            return problem(
                405,
                "method_not_allowed",
                f"this route takes {', '.join(methods)}, not {scope['method']}",
                remedy=_SEE_DOCUMENT,
                state=self._state_name(),
                headers={"Allow": ", ".join(methods)},
            )
        return self._unknown("there is no admin route of this path")

    def _unknown(self, detail: str) -> ASGIApp:
        return problem(404, "unknown_route", detail, remedy=_SEE_DOCUMENT, state=self._state_name())


def _bearer(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, token = value.decode(errors="replace").partition(" ")
            return token.strip() if kind.lower() == "bearer" else ""
    return ""
