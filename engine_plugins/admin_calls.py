"""One call of an engine's admin contract: a token shown, an answer read, or an error that says why.

Every answer that is not a success becomes an error that names the engine.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import httpx
import msgspec

from engine_plugins.engine_url import PREFIX, engine_url
from engine_plugins.errors import (
    AdminAnswerError,
    EngineUnreachableError,
    NotConfiguredError,
    SettingsError,
)
from engine_plugins.repeated_calls import answered
from engine_plugins.tls import CaFile, ClientCert, tls_context, tls_error, tls_hint

__all__ = ["AdminCalls"]

TOKEN = "ENGINE_PLUGINS_ADMIN_TOKEN"
TOKEN_FILE = "ENGINE_PLUGINS_ADMIN_TOKEN_FILE"
PROBLEM = "urn:engine-plugins:"
"""How the type of an engine's own problem documents begins."""
CONNECT_S = 5.0
"""For a connection to be made, or to become free; what cannot be made is tried twice again."""

Answer = TypeVar("Answer")


class AdminCalls:
    """The connections to one engine, and what is sent over them; see `AdminClient` for the rest.

    Raises:
        SettingsError: the url is not that of an HTTP server, or `ca_file` or `client_cert` cannot
            be used.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout_s: float,
        ca_file: CaFile | None,
        client_cert: ClientCert | None,
    ) -> None:
        base = engine_url(url)
        self.url = str(base).rstrip("/").removesuffix(PREFIX)
        self._token = token
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            base_url=self.url + PREFIX,
            transport=httpx.HTTPTransport(
                retries=2, verify=tls_context(base, ca_file, client_cert)
            ),
            trust_env=False,
        )

    def hurried(self, timeout_s: float) -> Self:
        """The same, over the same connections, with less time for ordinary answers."""
        made = copy.copy(self)
        made._timeout_s = min(timeout_s, self._timeout_s)
        return made

    def close(self) -> None:
        """Close the connections. Repeating it does nothing."""
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        *,
        scope: str = "control",
        json: object = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        patience_s: float = 0.0,
        grace_s: float = math.inf,
    ) -> Answer:
        """Send one request; the engine may take `patience_s` and the usual wait or `grace_s`.

        Args:
            method: of HTTP.
            path: below the contract's prefix.
            answer: the type that a success is read as.
            scope: which token is shown, where a file has one for each scope.
            json: the body, or `content` as it is.
            content: the body.
            headers: beside the token.
            patience_s: for what the engine was asked to do.
            grace_s: the most to wait after that.

        Raises:
            AdminAnswerError: the answer is not a success, or cannot be read.
            EngineUnreachableError: there is none.
        """
        wait_s = patience_s + min(self._timeout_s, grace_s)
        send = partial(
            self._http.request,
            method,
            path,
            json=json,
            content=content,
            headers={**(headers or {}), "authorization": f"Bearer {self._bearer(scope)}"},
            timeout=httpx.Timeout(wait_s, connect=CONNECT_S, write=self._timeout_s, pool=CONNECT_S),
        )
        try:
            response = answered(send, path)
        except httpx.TimeoutException as error:
            raise EngineUnreachableError(
                f"{self.url} did not answer {method} {PREFIX}{path} within {wait_s:g} s "
                f"({type(error).__name__})",
                remedy="look at the engine's log; GET /admin/v1/weights says what it holds",
                nobody_listens=isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout),
            ) from error
        except httpx.RequestError as error:
            raise tls_error(self.url, error) or EngineUnreachableError(
                f"{self.url} cannot be reached for {method} {PREFIX}{path}: {error}",
                remedy="check that the engine runs and that the url is its API server's"
                + tls_hint(self.url, error),
                nobody_listens=isinstance(error, httpx.ConnectError),
            ) from error
        return self._read(response, answer)

    def _read(self, response: httpx.Response, answer: type[Answer]) -> Answer:
        if not response.is_success:
            raise _problem(self.url, response)
        try:
            return msgspec.json.decode(response.content, type=answer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise AdminAnswerError(
                url=self.url,
                status=response.status_code,
                code="unreadable_answer",
                state="",
                detail=f"the answer to {response.request.url.path} is not as agreed: {error}",
                remedy="use the same release of engine-plugins in trainer and engine",
                by_engine=False,
            ) from error

    def _bearer(self, scope: str) -> str:
        token = self._token or os.environ.get(TOKEN, "") or _token_from_file(scope)
        if not token:
            raise NotConfiguredError(
                f"no admin token for {self.url}", remedy=f"pass token=, or set {TOKEN}"
            )
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise SettingsError("the admin token has characters that HTTP cannot carry")
        return token


class _Problem(msgspec.Struct):
    type: str = ""
    title: str = ""
    detail: str = ""
    code: str = "admin_answer"
    state: str | None = None
    remedy: str | None = None


def _problem(url: str, response: httpx.Response) -> AdminAnswerError:
    """Tell an error answer; what is not problem+json is quoted."""
    try:
        problem = msgspec.json.decode(response.content, type=_Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        problem = _Problem(detail=response.text[:200])
    remedy = problem.remedy or ""
    if response.status_code == httpx.codes.NOT_FOUND and problem.code == "admin_answer":
        remedy = "the server has no admin routes: start it with engine-plugins"
    return AdminAnswerError(
        url=url,
        status=response.status_code,
        code=problem.code,
        state=problem.state or "",
        detail=problem.detail or problem.title or "no detail",
        remedy=remedy,
        by_engine=problem.type.startswith(PROBLEM),
        retry_after="retry-after" in response.headers,
    )


def _token_from_file(scope: str) -> str:
    """First token in the token file whose scope is the one asked for."""
    path = os.environ.get(TOKEN_FILE, "")
    if not path:
        return ""
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise SettingsError(f"{TOKEN_FILE} names {path}, which cannot be read: {error}") from error
    return next((line[1] for line in lines if len(line) == 2 and line[0] == scope), "")
