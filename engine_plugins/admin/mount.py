"""Where an application hands requests to the admin application."""

from __future__ import annotations

from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Scope

__all__ = ["PREFIX", "AdminMount"]

PREFIX = "/admin/v1"


class AdminMount(Mount):
    """A mount at `PREFIX` that takes the bare prefix too.

    The application around it would redirect that to `PREFIX/`, at the host that the request names
    and before a token is asked for.
    """

    def __init__(self, admin: ASGIApp) -> None:
        super().__init__(PREFIX, app=admin)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As a mount, with the bare prefix as `PREFIX/`."""
        path = scope.get("path", "")
        if path.endswith(PREFIX):
            return super().matches({**scope, "path": f"{path}/"})
        return super().matches(scope)
