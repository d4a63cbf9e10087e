"""Who may call which route: bearer tokens with scopes, read before anything else.

This is ASGI in front of the routes, not a dependency of them: a request without a right token is
answered before its body is read, however large or malformed it is. The scope that counts is that of
the route which the router will run; a request that no route will take is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from engine_plugins.admin.error_responses import problem
from engine_plugins.admin.route_table import RouteKey, RouteTable, oddity_of_path
from engine_plugins.admin.token_book import TokenBook, TokenScope
from engine_plugins.settings import PREFIX

__all__ = ["BearerAuth"]

_SEE_DOCUMENT = "GET /admin/v1/openapi.json lists the routes"


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
        await self._tokens.refresh()
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        if not self._tokens.configured:
            return problem(
                503,
                "not_configured",
                "this server has no admin token, so its admin routes are closed",
                remedy=f"start it with {PREFIX}ADMIN_TOKEN or {PREFIX}ADMIN_TOKEN_FILE set; if it "
                "was, the server's log says what is wrong with it",
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


def _bearer(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, token = bytes(value).partition(b" ")
            return token.strip() if kind.lower() == b"bearer" else b""
    return b""
