"""Reading the error answers of the admin routes."""

from __future__ import annotations

import httpx

__all__ = ["problem"]


def problem(response: httpx.Response, status: int, code: str) -> str:
    """Check that an answer is this problem, in full form, and give its words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["title"]
    assert body["remedy"], "an error says what to do"
    return str(body["detail"])
