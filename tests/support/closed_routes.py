"""What holds for the closed routes of either engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx
from fastapi import FastAPI

__all__ = ["check_closed"]


def check_closed(app: FastAPI, instead: Mapping[str, str], *, open_route: str) -> None:
    """Each answers 409 and names what to call, by any method, however the router reads its path.

    Args:
        app: an engine's application with its routes closed.
        instead: what each is to name.
        open_route: one of the others, which answers as before.
    """

    async def ask() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://engine", follow_redirects=True
        ) as client:
            for path, remedy in instead.items():
                for method in ("GET", "POST", "PUT"):
                    for spelling in (path, f"{path}%0A", f"{path}/", f"{path}?x=1"):
                        _check(await client.request(method, spelling), path, remedy)
            assert (await client.get(open_route)).status_code == 200

    asyncio.run(ask())


def _check(answer: httpx.Response, path: str, remedy: str) -> None:
    assert answer.status_code == 409, (path, answer.text)
    told = answer.json()
    assert (told["code"], told["remedy"]) == ("closed_route", remedy)
    assert path in told["detail"]
