"""Bodies that are read the same under every release of FastAPI: one JSON object, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

__all__ = ["StrictRoute"]


class StrictRoute(APIRoute):
    """A route whose body is read by msgspec.

    Python's own reader takes `NaN`, halves of surrogate pairs, which no file name or log can hold,
    and UTF-16; and releases of FastAPI differ in what a body of `null` is.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI calls it once for each route."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body's object.

        Raises:
            HTTPException: 400, which FastAPI passes on as it is.
        """
        body = await self.body()
        try:
            value = msgspec.json.decode(body)
        # UnicodeDecodeError: bytes in a string that are not UTF-8.
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise HTTPException(400, f"the body is not JSON that can be read: {error}") from error
        if not isinstance(value, dict):
            raise HTTPException(400, "the body is JSON, and not an object")
        return value
