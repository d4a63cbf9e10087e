"""What holds every answer of the tests against the document can tell one that does not hold."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.documented import undocumented

PROBLEM = {
    "type": "urn:engine-plugins:illegal_state",
    "title": "Conflict",
    "status": 409,
    "detail": "seen",
    "code": "illegal_state",
    "state": "serving",
    "remedy": "wait",
}
PROBLEM_JSON = "application/problem+json"


def answer(
    status: int,
    body: Any,
    *,
    kind: str = PROBLEM_JSON,
    path: str = "/flush",
    method: str = "POST",
    **headers: str,
) -> httpx.Response:
    return httpx.Response(
        status,
        json=body,
        headers={"content-type": kind, "x-request-id": "r"} | headers,
        request=httpx.Request(method, f"http://engine/admin/v1{path}"),
    )


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (answer(200, {"flushed": []}, kind="application/json"), ""),
        (answer(409, PROBLEM, **{"retry-after": "1"}), ""),
        (answer(404, PROBLEM, path="/nowhere"), ""),
        (answer(405, PROBLEM, method="PUT", allow="POST"), ""),
        (answer(418, PROBLEM), "a status that the document does not have"),
        (answer(409, PROBLEM, kind="application/json"), "the media type application/json"),
        (answer(409, PROBLEM | {"more": 1}), "'more' was unexpected"),
        (answer(409, {**PROBLEM, "status": "409"}), "'409' is not of type 'integer'"),
        (answer(409, PROBLEM | {"state": "gone"}), "$.state"),
        (answer(422, PROBLEM, **{"retry-after": "1"}), "headers"),
        (answer(200, {}, kind="application/json"), "'flushed' is a required property"),
        (answer(409, PROBLEM, path="/nowhere"), "no operation of the document"),
        (answer(405, PROBLEM, method="PUT"), "no Allow"),
    ],
)
def test_a_fault_is_found(given: httpx.Response, fault: str) -> None:
    told = undocumented(given)
    assert fault in told
    assert bool(told) == bool(fault)


def test_an_answer_without_a_request_id_is_a_fault() -> None:
    given = answer(409, PROBLEM)
    del given.headers["x-request-id"]
    assert "no X-Request-Id" in undocumented(given)
