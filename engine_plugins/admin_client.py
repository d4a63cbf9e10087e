"""A typed client of one engine's admin contract, for trainers and tools.

It says nothing on its own: every call is one request, and every answer that is not a success
becomes an error that names the engine.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Self, Unpack

import msgspec

from engine_plugins.admin_answers import (
    Direction,
    EngineOffer,
    EngineState,
    PauseMode,
    UpdateRequest,
    Weights,
)
from engine_plugins.admin_calls import AdminCalls
from engine_plugins.errors import AdminAnswerError, BodyTooLargeError
from engine_plugins.prefill_gate.gate_report import GateChanges, GateReport
from engine_plugins.sleep.memory_backend import MemoryTag
from engine_plugins.sleep.memory_report import ResidualReport
from engine_plugins.tls import CaFile, ClientCert
from engine_plugins.weights.contract.manifest import MSGPACK
from engine_plugins.weights.contract.manifest_batch import encode_batch, pack_manifest
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport

__all__ = ["AdminClient"]

UPDATE_GRACE_S = 4.2
"""After an update's deadline: the trainer is to be told within 5 s of it, whatever is stopped."""
MANIFEST_S = 1.0
"""For an engine to check and keep one manifest of a batch."""
RELEASE_S = 300.0
"""For weights that go to host memory or disk, or come back, and for memory to come to rest."""


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
        self._calls = AdminCalls(
            url, token=token, timeout_s=timeout_s, ca_file=ca_file, client_cert=client_cert
        )
        self.url = self._calls.url
        self._connect_timeout_s = connect_timeout_s

    def hurried(self, timeout_s: float) -> Self:
        """The same client, over the same connections, that waits less for ordinary answers."""
        made = copy.copy(self)
        made._calls = self._calls.hurried(timeout_s)
        return made

    def close(self) -> None:
        """Close the connections. Repeating it does nothing."""
        self._calls.close()

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
        return self._calls.call("GET", "/state", EngineState, scope="read")

    def weights(self) -> Weights:
        """Ask for the installed version and the reports of past updates."""
        return self._calls.call("GET", "/weights", Weights, scope="read")

    def manifest(self) -> EngineOffer:
        """Ask for what the engine offers its peers: manifests of the version that it holds."""
        return self._calls.call("GET", "/weights/manifest", EngineOffer, scope="weights")

    def pause(
        self, mode: PauseMode = "keep", *, timeout_s: float = 30.0, hold_s: float | None = None
    ) -> EngineState:
        """Stop generation; returns once the scheduler stands still."""
        body = {"mode": mode, "timeout_s": timeout_s, "hold_s": hold_s}
        return self._calls.call("POST", "/pause", EngineState, json=body, patience_s=timeout_s)

    def resume(self) -> EngineState:
        """Let a paused engine generate again."""
        return self._calls.call("POST", "/resume", EngineState)

    def flush(self, *, prefix_cache: bool = True, multimodal_cache: bool = True) -> list[str]:
        """Empty caches; returns the names of those that were emptied."""
        body = {"prefix_cache": prefix_cache, "multimodal_cache": multimodal_cache}
        return self._calls.call("POST", "/flush", _Flushed, json=body).flushed

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
        answer = self._calls.call(
            "POST", "/sleep", _Asleep, json=body, patience_s=timeout_s + RELEASE_S
        )
        return answer.memory

    def wake(self, tags: Sequence[MemoryTag] | None = None) -> EngineState:
        """Have the engine map memory again: all that is released, if no tags are named."""
        return self._calls.call(
            "POST", "/wake", EngineState, json={"tags": tags}, patience_s=RELEASE_S
        )

    def memory(self) -> ResidualReport:
        """Ask what is resident of every rank, where the figures come from, how good they are."""
        return self._calls.call("GET", "/memory", ResidualReport, scope="read")

    def prefill_gate(self) -> GateReport:
        """Ask for the prefill gate's settings, calibration and counters."""
        return self._calls.call("GET", "/prefill-gate", GateReport, scope="read")

    def set_prefill_gate(self, **changes: Unpack[GateChanges]) -> GateReport:
        """Change settings of the prefill gate until the server ends; what is not named stays.

        Raises:
            AdminAnswerError: also with code `refused_setting`, where nothing has changed.
        """
        return self._calls.call("PATCH", "/prefill-gate", GateReport, json=changes)

    def reset_prefill_gate(self) -> GateReport:
        """Have the prefill gate forget what it measured, who waits, and its counters."""
        return self._calls.call("POST", "/prefill-gate/reset", GateReport)

    def put_source(self, manifest: bytes) -> str:
        """Offer one trainer process's manifest (msgpack); returns the engine's source_id."""
        headers = {"content-type": MSGPACK}
        packed = pack_manifest(manifest)
        if packed is not manifest:
            headers["content-encoding"] = "gzip"
        return self._calls.call(
            "POST", "/weights/sources", _Source, content=packed, headers=headers, scope="weights"
        ).source_id

    def put_sources(self, packed: Sequence[bytes | bytearray | memoryview]) -> list[str]:
        """Offer many trainer processes' manifests; the engine's source_ids, in their order.

        What is over the engine's limit of a body goes in several calls.

        Args:
            packed: each as `pack_manifest` gives it, at most `MAX_BATCH`.
        """
        try:
            return self._calls.call(
                "POST",
                "/weights/sources/batch",
                _Sources,
                content=encode_batch(packed),
                headers={"content-type": MSGPACK},
                scope="weights",
                patience_s=len(packed) * MANIFEST_S,
            ).source_ids
        except AdminAnswerError as error:
            if error.code != BodyTooLargeError.code or len(packed) == 1:
                raise
        half = len(packed) // 2
        return [*self.put_sources(packed[:half]), *self.put_sources(packed[half:])]

    def connect(
        self,
        source_ids: Sequence[str],
        *,
        direction: Direction = "pull",
        model: Mapping[str, str | int | bool] | None = None,
        tell_dtypes: bool = False,
    ) -> PlanSummary:
        """Have the engine plan from the sources: a pull, or a push to its `destinations`.

        Args:
            source_ids: as `put_source` gave them.
            direction: who moves the bytes.
            model: facts of the trainer's HF config.
            tell_dtypes: where tensors must come in another dtype, have no plan and their names in
                `wanted`, instead of an error.
        """
        facts = dict(model or {})
        asked = {"tell_dtypes": True} if tell_dtypes else {}
        return self._calls.call(
            "POST",
            "/weights/connect",
            PlanSummary,
            json={"source_ids": list(source_ids), "direction": direction, "model": facts, **asked},
            scope="weights",
            patience_s=self._connect_timeout_s,
        )

    def update(self, request: UpdateRequest) -> UpdateReport:
        """Have the engine fetch and install a version; waits for its report."""
        return self._calls.call(
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
        return self._calls.call(
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
        return self._calls.call(
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
        return self._calls.call(
            "POST",
            "/weights/abort",
            UpdateReport,
            json={"request_id": request_id, "writes_ended": writes_ended},
            scope="weights",
        )


class _Source(msgspec.Struct):
    source_id: str


class _Sources(msgspec.Struct):
    source_ids: list[str]


class _Asleep(msgspec.Struct):
    memory: ResidualReport


class _Flushed(msgspec.Struct):
    flushed: list[str]
