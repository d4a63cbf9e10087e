"""A typed client of one engine's admin contract, for trainers and tools.

It says nothing on its own: every call is one request, and every answer that is not a success
becomes an error that names the engine.
"""

from __future__ import annotations

import copy
import gzip
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar, Unpack

import httpx
import msgspec

from engine_plugins.admin_answers import (
    Direction,
    EngineOffer,
    EngineState,
    PauseMode,
    UpdateRequest,
    Weights,
)
from engine_plugins.engine_url import PREFIX, engine_url
from engine_plugins.errors import (
    AdminAnswerError,
    EngineUnreachableError,
    NotConfiguredError,
    SettingsError,
)
from engine_plugins.prefill_gate.gate_report import GateChanges, GateReport
from engine_plugins.repeated_calls import answered
from engine_plugins.sleep.memory_backend import MemoryTag
from engine_plugins.sleep.memory_report import ResidualReport
from engine_plugins.tls import CaFile, ClientCert, tls_context, tls_error, tls_hint
from engine_plugins.weights.manifest import MSGPACK
from engine_plugins.weights.report import PlanSummary, UpdateReport

__all__ = ["AdminClient"]

TOKEN = "ENGINE_PLUGINS_ADMIN_TOKEN"
TOKEN_FILE = "ENGINE_PLUGINS_ADMIN_TOKEN_FILE"
PROBLEM = "urn:engine-plugins:"
"""How the type of an engine's own problem documents begins."""
GZIP_ABOVE_BYTES = 64 * 1024
CONNECT_S = 5.0
"""For a connection to be made, or to become free; what cannot be made is tried twice again."""
UPDATE_GRACE_S = 4.2
"""After an update's deadline: the trainer is to be told within 5 s of it, whatever is stopped."""
RELEASE_S = 300.0
"""For weights that go to host memory or disk, or come back, and for memory to come to rest."""

Answer = TypeVar("Answer")


class AdminClient:
    """Calls one engine's admin routes; safe to use from several threads.

    A connection that cannot be made is tried again twice: nothing has been sent then. A pause,
    resume, sleep or wake whose connection breaks is sent once more; nothing else is repeated here.
    An update may be repeated by its `request_id`. Proxies from the
    environment are not used, and redirects are not followed: the token is for this engine.

    Args:
        url: the engine's base url, `http://host:8000` or `https://host:8000`.
        token: bearer token; by default `ENGINE_PLUGINS_ADMIN_TOKEN`, or the fitting line of the
            file that `ENGINE_PLUGINS_ADMIN_TOKEN_FILE` names, read for every request.
        timeout_s: seconds to wait for an ordinary answer.
        connect_timeout_s: seconds to wait for a plan (the engine traces its loader).
        ca_file: for https, the PEM file of the authority that signed the engine's certificate; by
            default the authorities that httpx knows. A certificate is always verified.
        client_cert: for engines that demand one, the PEM file of the caller's certificate and
            key, or both files.

    Raises:
        SettingsError: the url is not that of an HTTP server, or `ca_file` or `client_cert` cannot
            be used.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 300.0,
        ca_file: CaFile | None = None,
        client_cert: ClientCert | None = None,
    ) -> None:
        base = engine_url(url)
        self.url = str(base).rstrip("/").removesuffix(PREFIX)
        self._token = token
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._http = httpx.Client(
            base_url=self.url + PREFIX,
            transport=httpx.HTTPTransport(
                retries=2, verify=tls_context(base, ca_file, client_cert)
            ),
            trust_env=False,
        )

    def hurried(self, timeout_s: float) -> Self:
        """The same client, over the same connections, that waits less for ordinary answers."""
        made = copy.copy(self)
        made._timeout_s = min(timeout_s, self._timeout_s)
        return made

    def close(self) -> None:
        """Close the connections. Repeating it does nothing."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def state(self) -> EngineState:
        """Ask what the engine is doing; it answers at once, during an update too."""
        return self._call("GET", "/state", EngineState, scope="read")

    def weights(self) -> Weights:
        """Ask for the installed version and the reports of past updates."""
        return self._call("GET", "/weights", Weights, scope="read")

    def manifest(self) -> EngineOffer:
        """Ask for what the engine offers its peers: manifests of the version that it holds."""
        return self._call("GET", "/weights/manifest", EngineOffer, scope="weights")

    def pause(
        self, mode: PauseMode = "keep", *, timeout_s: float = 30.0, hold_s: float | None = None
    ) -> EngineState:
        """Stop generation; returns once the scheduler stands still."""
        body = {"mode": mode, "timeout_s": timeout_s, "hold_s": hold_s}
        return self._call("POST", "/pause", EngineState, json=body, patience_s=timeout_s)

    def resume(self) -> EngineState:
        """Let a paused engine generate again."""
        return self._call("POST", "/resume", EngineState)

    def flush(self, *, prefix_cache: bool = True, multimodal_cache: bool = True) -> list[str]:
        """Empty caches; returns the names of those that were emptied."""
        body = {"prefix_cache": prefix_cache, "multimodal_cache": multimodal_cache}
        return self._call("POST", "/flush", _Flushed, json=body).flushed

    def sleep(
        self,
        level: Literal[1, 2] = 1,
        tags: Sequence[MemoryTag] | None = None,
        *,
        timeout_s: float = 30.0,
    ) -> ResidualReport:
        """Have the engine give its memory back; what is still resident of it.

        Args:
            level: 1 keeps the weights for wake, 2 wants an update before the engine serves again.
            tags: what to release; everything that the engine can, if none are named.
            timeout_s: of the pause that comes first.

        Raises:
            AdminAnswerError: also with code `residual_memory`, where the engine sleeps and holds
                more than it may.
        """
        body = {"level": level, "tags": tags, "timeout_s": timeout_s}
        answer = self._call("POST", "/sleep", _Asleep, json=body, patience_s=timeout_s + RELEASE_S)
        return answer.memory

    def wake(self, tags: Sequence[MemoryTag] | None = None) -> EngineState:
        """Have the engine map memory again: all that is released, if no tags are named."""
        return self._call("POST", "/wake", EngineState, json={"tags": tags}, patience_s=RELEASE_S)

    def memory(self) -> ResidualReport:
        """Ask what is resident of every rank, where the figures come from, how good they are."""
        return self._call("GET", "/memory", ResidualReport, scope="read")

    def prefill_gate(self) -> GateReport:
        """Ask for the prefill gate's settings, calibration and counters."""
        return self._call("GET", "/prefill-gate", GateReport, scope="read")

    def set_prefill_gate(self, **changes: Unpack[GateChanges]) -> GateReport:
        """Change settings of the prefill gate until the server ends; what is not named stays.

        Raises:
            AdminAnswerError: also with code `refused_setting`, where nothing has changed.
        """
        return self._call("PATCH", "/prefill-gate", GateReport, json=changes)

    def reset_prefill_gate(self) -> GateReport:
        """Have the prefill gate forget what it measured, who waits, and its counters."""
        return self._call("POST", "/prefill-gate/reset", GateReport)

    def put_source(self, manifest: bytes) -> str:
        """Offer one trainer process's manifest (msgpack); returns the engine's source_id."""
        headers = {"content-type": MSGPACK}
        if len(manifest) > GZIP_ABOVE_BYTES:
            manifest = gzip.compress(manifest, compresslevel=1)
            headers["content-encoding"] = "gzip"
        return self._call(
            "POST", "/weights/sources", _Source, content=manifest, headers=headers, scope="weights"
        ).source_id

    def connect(
        self,
        source_ids: Sequence[str],
        *,
        direction: Direction = "pull",
        model: Mapping[str, str | int | bool] | None = None,
    ) -> PlanSummary:
        """Have the engine plan from the sources: a pull, or a push to its `destinations`."""
        facts = dict(model or {})
        return self._call(
            "POST",
            "/weights/connect",
            PlanSummary,
            json={"source_ids": list(source_ids), "direction": direction, "model": facts},
            scope="weights",
            patience_s=self._connect_timeout_s,
        )

    def update(self, request: UpdateRequest) -> UpdateReport:
        """Have the engine fetch and install a version; waits for its report."""
        return self._call(
            "POST",
            "/weights/update",
            UpdateReport,
            json=msgspec.to_builtins(request),
            scope="weights",
            patience_s=request.timeout_s,
            grace_s=UPDATE_GRACE_S,
        )

    def prepare(self, request: UpdateRequest) -> UpdateReport:
        """Have the engine get ready for a version, to be installed by `commit`."""
        return self._call(
            "POST",
            "/weights/prepare",
            UpdateReport,
            json=msgspec.to_builtins(request),
            scope="weights",
            patience_s=request.timeout_s,
            grace_s=UPDATE_GRACE_S,
        )

    def commit(self, request_id: str, *, timeout_s: float) -> UpdateReport:
        """Have the engine install what it prepared; `timeout_s` is that of `prepare`."""
        return self._call(
            "POST",
            "/weights/commit",
            UpdateReport,
            json={"request_id": request_id},
            scope="weights",
            patience_s=timeout_s,
            grace_s=UPDATE_GRACE_S,
        )

    def abort(self, request_id: str, *, writes_ended: bool = False) -> UpdateReport:
        """Have the engine give up what it prepared; of a push, say if no write is under way."""
        return self._call(
            "POST",
            "/weights/abort",
            UpdateReport,
            json={"request_id": request_id, "writes_ended": writes_ended},
            scope="weights",
        )

    def _call(
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
        """Send one request; the engine may take `patience_s` and the usual wait or `grace_s`."""
        wait_s = patience_s + min(self._timeout_s, grace_s)
        send = partial(
            self._http.request,
            method,
            path,
            json=json,
            content=content,
            headers={**(headers or {}), "authorization": f"Bearer {self._bearer(scope)}"},
            timeout=httpx.Timeout(wait_s, connect=5.0, write=self._timeout_s, pool=5.0),
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


class _Source(msgspec.Struct):
    source_id: str


class _Asleep(msgspec.Struct):
    memory: ResidualReport


class _Flushed(msgspec.Struct):
    flushed: list[str]


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
