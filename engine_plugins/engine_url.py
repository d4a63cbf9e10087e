"""The url of an engine's server, as callers give it."""

from __future__ import annotations

import httpx

from engine_plugins.errors import SettingsError

__all__ = ["PREFIX", "engine_url"]

PREFIX = "/admin/v1"


def engine_url(url: str) -> httpx.URL:
    """The url of a server, whatever of its routes it was given with.

    Raises:
        SettingsError: it is none, or that of another route.
    """
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise SettingsError(
            f"an engine's url cannot be read: {error}", remedy="give http://host:port"
        ) from error
    # Without what may be a secret.
    shown = parts.copy_with(userinfo=b"", query=None, fragment=None)
    known = parts.scheme in ("http", "https") and parts.host and (parts.port or 80) < 2**16
    if not known or parts.userinfo or parts.query or parts.fragment:
        raise SettingsError(
            f"{shown} is not an engine's url{_why_not(parts)}",
            remedy="give http://host:port, without user, password or query",
        )
    if parts.path.rstrip("/").endswith("/v1") and not parts.path.rstrip("/").endswith(PREFIX):
        plain = parts.copy_with(path=parts.path.rstrip("/").removesuffix("/v1") or "/")
        raise SettingsError(
            f"{parts} is the url of the engine's OpenAI routes, and /v1 does not belong there: "
            "the admin routes are beside it",
            remedy=f"give {str(plain).rstrip('/')}",
        )
    return parts


def _why_not(parts: httpx.URL) -> str:
    """What of a url that looks right is too much; its value may be a secret."""
    more = {
        "a user or a password": parts.userinfo,
        "a query": parts.query,
        "a fragment": parts.fragment,
    }
    named = [name for name, value in more.items() if value]
    return f": it came with {' and '.join(named)}, which are not shown" if named else ""
