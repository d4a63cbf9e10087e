"""Every error of ours has a status, and every error answer has one shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from engine_plugins import errors
from engine_plugins.admin.error_responses import problem_from, status_of
from engine_plugins.errors import AdminAnswerError, EnginePluginError
from tests.support.admin_server import AdminServer

STATUS = {
    "AdminAnswerError": 500,
    "AdminRequestError": 400,
    "BodyTooLargeError": 413,
    "ConflictError": 409,
    "EngineCallError": 500,
    "EngineDeadError": 503,
    "EnginePluginError": 500,
    "EngineStuckError": 504,
    "EngineTlsError": 500,
    "EngineUnreachableError": 500,
    "HookModeError": 503,
    "ManifestError": 422,
    "MemoryPressureError": 503,
    "NotConfiguredError": 503,
    "OutdatedError": 503,
    "PauseTimeoutError": 504,
    "PeerError": 422,
    "PeerLostError": 503,
    "PlanError": 422,
    "PromptTooLargeError": 413,
    "RefusedSettingError": 422,
    "ResidualMemoryError": 507,
    "ServerFilesError": 503,
    "SettingsError": 503,
    "SleepRefusedError": 507,
    "SourceError": 500,
    "StaleVersionError": 409,
    "TransferTimeoutError": 504,
    "SourceRevokedError": 503,
    "UpdateEndUnknownError": 500,
    "TransportError": 500,
    "UnknownIdError": 404,
    "UnsupportedError": 422,
    "UpdateAbortedError": 409,
    "UpdateFailedError": 500,
    "WeightMismatchError": 422,
    "WriterStoppedError": 503,
}
"""As the contract says; 500 where the fault is the server's own, or a client's class."""

FIELDS = {"type", "title", "status", "detail", "code", "state", "remedy"}


def made(name: str) -> EnginePluginError:
    kind: type[EnginePluginError] = getattr(errors, name)
    if kind is AdminAnswerError:
        return AdminAnswerError(
            url="http://e", status=409, code="c", state="serving", detail="seen", remedy="do"
        )
    return kind("seen", remedy="do")


def test_the_table_above_is_of_every_class() -> None:
    """A new error is given a status on purpose."""
    assert sorted(STATUS) == errors.__all__


def test_codes_are_unique() -> None:
    """A client tells errors apart by `code`."""
    codes = [getattr(errors, name).code for name in errors.__all__]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_class_becomes_a_problem_with_its_status(name: str) -> None:
    """RFC 9457, with our three fields."""
    error = made(name)
    answer = problem_from(error, state="paused")
    body = json.loads(bytes(answer.body))
    assert answer.status_code == status_of(error) == STATUS[name]
    assert answer.media_type == answer.headers["content-type"] == "application/problem+json"
    assert set(body) - {"largest_prompt"} == FIELDS
    assert body["status"] == STATUS[name]
    assert body["code"] == error.code
    assert body["type"].endswith(error.code)
    assert body["detail"] == error.message
    assert (body["state"], body["remedy"]) == ("paused", "do")


def test_a_refused_prefill_says_what_fits_or_when() -> None:
    """As a field and as the header that clients know."""
    large = problem_from(errors.PromptTooLargeError("x", largest_prompt=700), state=None)
    assert json.loads(bytes(large.body))["largest_prompt"] == 700
    assert "retry-after" not in large.headers
    pressed = problem_from(errors.MemoryPressureError("x", retry_after_s=9), state=None)
    assert pressed.headers["retry-after"] == "9"
    assert "largest_prompt" not in json.loads(bytes(pressed.body))


def test_a_class_of_later_days_has_its_parents_status() -> None:
    """Looked up along the tree."""

    class NarrowerError(errors.PeerLostError):
        pass

    assert status_of(NarrowerError("x")) == 503


MALFORMED = "malformed_request"
UPDATE: dict[str, Any] = {"plan_id": "p", "version": 1}
WRONG_FIELDS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("/pause", "mode", (None, 1, True, ["keep"], {})),
    ("/pause", "timeout_s", (None, "30", True, [], -1, 86_401, 10**400)),
    ("/pause", "hold_s", ("1", False, 0, 1e9)),
    ("/flush", "prefix_cache", (None, 0, 1, "yes", "true", [])),
    ("/sleep", "level", (None, True, "1", 1.5, 0, 3)),
    ("/sleep", "tags", ([], "weights", [1], ["none"], {})),
    ("/wake", "tags", ([], "kv_cache", [None])),
    ("/weights/connect", "source_ids", (None, "source-1", [1], ["x" * 257], [], {})),
]
WRONG_UPDATES: list[dict[str, Any]] = [
    *({"version": value} for value in (True, "1", 1.5, None, 1 << 53, [1], 1e30)),
    *({"request_id": value} for value in (None, 5, "", "x" * 257)),
    *({"timeout_s": value} for value in ("30", True, None, 0)),
    *({name: value} for name in ("flush", "force") for value in (0, 1, "on", None)),
    *({"resume": value} for value in (0, "yes")),
    *({"source_word": value} for value in (0, True, "1", 1 << 53)),
]
BAD_REQUESTS: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("POST", "/pause", {"content": b"{not json"}, 400, "malformed_request"),
    ("POST", "/pause", {"content": b"\xff\xfe"}, 400, "malformed_request"),
    *(
        ("POST", path, {"content": body}, 400, "malformed_request")
        for path in ("/pause", "/flush", "/sleep", "/wake", "/weights/update")
        for body in (
            *(b"null", b"[]", b'"keep"', b"true", b"5", b" ", b"NaN", b'{"\xff": 1}', b"{} {}"),
            *(b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"),
            *('{"mode": "keep"}'.encode("utf-16"), b"\xef\xbb\xbf{}", b'{"\\udc00": 1}'),
        )
    ),
    *(
        ("POST", path, {"json": {field: value}}, 400, MALFORMED)
        for path, field, values in WRONG_FIELDS
        for value in values
    ),
    *(
        ("POST", "/weights/update", {"json": UPDATE | more}, 400, MALFORMED)
        for more in WRONG_UPDATES
    ),
    ("POST", "/pause", {"json": {"mode": "never"}}, 400, "malformed_request"),
    ("POST", "/pause", {"json": {"modus": "keep"}}, 400, "malformed_request"),
    ("POST", "/pause", {"json": {"timeout_s": 0}}, 400, "malformed_request"),
    ("POST", "/pause", {"content": b'{"timeout_s": NaN}'}, 400, "malformed_request"),
    ("POST", "/pause", {"content": b'{"timeout_s": Infinity}'}, 400, "malformed_request"),
    ("POST", "/pause", {"content": b'{"hold_s": 1e999}'}, 400, "malformed_request"),
    ("POST", "/pause", {"json": {"hold_s": -1}}, 400, "malformed_request"),
    ("POST", "/flush", {"json": []}, 400, "malformed_request"),
    ("POST", "/weights/connect", {"json": {"source_ids": []}}, 400, "malformed_request"),
    ("POST", "/weights/connect", {"json": {}}, 400, "malformed_request"),
    ("POST", "/weights/update", {"content": b""}, 400, "malformed_request"),
    ("POST", "/weights/update", {"json": {"plan_id": "p"}}, 400, "malformed_request"),
    (
        "POST",
        "/weights/update",
        {"json": {"plan_id": "p", "version": -1}},
        400,
        "malformed_request",
    ),
    (
        "POST",
        "/weights/update",
        {"content": b'{"plan_id": "p", "version": 1, "request_id": "\\ud800"}'},
        400,
        "malformed_request",
    ),
    ("POST", "/weights/update", {"json": {"plan_id": "p", "version": 1}}, 404, "unknown_id"),
    ("POST", "/weights/update", {"json": {"plan_id": "../..", "version": 1}}, 404, "unknown_id"),
    *(
        ("POST", "/weights/connect", {"json": {"source_ids": [name]}}, 404, "unknown_id")
        for name in ("source-1", "..", ".", "", "a/b", "../plans/x", "a\0b", "ü")
    ),
    (
        "POST",
        "/weights/connect",
        {"json": {"source_ids": ["source-1"], "direction": "push"}},
        404,
        "unknown_id",
    ),
    (
        "POST",
        "/weights/update",
        {"json": {"plan_id": "p", "version": 1, "verify": "full"}},
        422,
        "unsupported",
    ),
    ("POST", "/weights/prepare", {"json": {"plan_id": "p", "version": 1}}, 404, "unknown_id"),
    *(
        ("POST", f"/weights/{call}", {"json": {"request_id": name}}, 404, "unknown_id")
        for call in ("commit", "abort")
        for name in ("r", "../answers", "ü\n")
    ),
    ("POST", "/weights/commit", {"json": {}}, 400, "malformed_request"),
    ("POST", "/weights/commit", {"json": {"request_id": ""}}, 400, "malformed_request"),
    ("POST", "/weights/sources", {"content": b"garbage"}, 400, "malformed_request"),
    ("POST", "/weights/sources", {"content": b""}, 400, "malformed_request"),
    ("POST", "/weights/sources/batch", {"content": b"garbage"}, 400, "malformed_request"),
    ("GET", "/nothing", {}, 404, "unknown_route"),
    ("GET", "/pause", {}, 405, "method_not_allowed"),
    ("DELETE", "/state", {}, 405, "method_not_allowed"),
]


@pytest.mark.anyio
async def test_bad_requests_are_problems_and_change_nothing(
    make_server: Callable[..., AdminServer],
) -> None:
    """Whatever is sent: the status that fits, the same fields, and an engine that serves on."""
    server = make_server()
    async with server.running():
        before = server.shared.read()
        for method, path, request, status, code in BAD_REQUESTS:
            answer = await server.http.request(method, path, **request)
            told = f"{method} {path} {str(request)[:80]}: {answer.text[:200]}"
            assert (answer.status_code, answer.json()["code"]) == (status, code), told
            assert answer.headers["content-type"] == "application/problem+json", told
            assert set(answer.json()) == FIELDS, told
            assert answer.json()["state"] == "serving"
            assert answer.json()["detail"]
            assert answer.json()["remedy"], told
        assert server.shared.read() == before
        assert server.engine.serves(seed=0)
        assert "pause keep" not in server.engine.calls


@pytest.mark.anyio
async def test_a_bug_of_ours_is_a_problem_too(
    make_server: Callable[..., AdminServer], caplog: pytest.LogCaptureFixture
) -> None:
    """The application around us never sees the exception; the log has it."""
    server = make_server()

    async def broken(**caches: bool) -> None:
        raise ZeroDivisionError("one by none")

    server.engine.flush = broken  # type: ignore[assignment, method-assign]
    async with server.running():
        answer = await server.post("/flush")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "ZeroDivisionError: one by none" in answer.json()["detail"]
    assert "an admin route failed" in caplog.text


@pytest.mark.anyio
async def test_a_body_does_not_come_back_in_its_error(
    make_server: Callable[..., AdminServer],
) -> None:
    """A field's name of 900 KB had."""
    server = make_server()
    async with server.running():
        for body in ({"x" * 900_000: 1}, {"mode": "x" * 900_000}, {"mode": {"y" * 900_000: 1}}):
            answer = await server.http.post("/pause", json=body)
            assert (answer.status_code, answer.json()["code"]) == (400, MALFORMED)
            assert len(answer.content) < 1000


@pytest.mark.parametrize(
    ("error", "state", "seconds"),
    [
        (errors.ConflictError("x"), "updating", "1"),
        (errors.ConflictError("x"), "asleep", None),
        (errors.StaleVersionError("x"), "updating", None),
        (errors.PauseTimeoutError("x"), "serving", "5"),
        (errors.TransferTimeoutError("x"), "serving", "5"),
        (errors.PeerLostError("x"), "serving", None),
        (errors.NotConfiguredError("x"), None, None),
        (errors.WeightMismatchError("x"), "serving", None),
    ],
)
def test_who_may_succeed_by_waiting_is_told_how_long(
    error: errors.EnginePluginError, state: str | None, seconds: str | None
) -> None:
    """And nobody else: a client that waits for nothing waits for ever."""
    assert problem_from(error, state=state).headers.get("retry-after") == seconds
