"""Who may call which route: bearer tokens with scopes, read before anything else.

This is ASGI in front of the routes, not a dependency of them: a request without a right token is
answered before its body is read, however large or malformed it is.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from starlette.types import ASGIApp, Receive, Scope, Send

from engine_plugins.admin.error_responses import problem
from engine_plugins.errors import SettingsError
from engine_plugins.settings import PREFIX, Settings

__all__ = ["BearerAuth", "TokenBook", "TokenScope"]

TokenScope = Literal["read", "control", "weights"]
ALL_SCOPES: frozenset[TokenScope] = frozenset(get_args(TokenScope))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    token: bytes
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
        scopes: the scope that each (method, path) needs; others need any valid token.
    """

    def __init__(
        self, app: ASGIApp, tokens: TokenBook, scopes: Mapping[tuple[str, str], TokenScope]
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._scopes = scopes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
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
        needed = self._scopes.get((scope["method"], _route_path(scope)))
        if needed is not None and needed not in granted:
            return problem(
                403,
                "forbidden",
                f"this route needs a token of scope {needed}; yours has "
                f"{', '.join(sorted(granted))}",
                remedy="use another token",
            )
        return None


def _route_path(scope: Scope) -> str:
    """The path below the mount point, whatever the server's root path is."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _bearer(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, token = value.decode(errors="replace").partition(" ")
            return token.strip() if kind.lower() == "bearer" else ""
    return ""
