"""Whoever knocks with whatever path: a request acts only with the scope of the route that runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine_plugins.admin.routes import SCOPES
from tests.support.configurations import DENSE, on
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.raw_http import RawAnswer, raw_request
from tests.support.served import Served

pytestmark = on(DENSE)

PREFIX = b"/admin/v1"
GARBAGE = b"{garbage"
"""A body that no route takes: one that runs answers 400 and changes nothing."""
ROUTES = sorted(SCOPES)
PATHS = sorted({path for _, path in ROUTES})
METHODS = [*("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"), "post", "Get"]
DENIED = {401, 403, 404, 405}
BY_SCOPE = {"read": "r-token", "control": "c-token", "weights": "w-token"}


@pytest.fixture
def guarded(served: Served) -> Iterator[Served]:
    """The server with one token for each scope; nothing that was sent has changed it."""
    before = served.server.state()
    lines = "".join(f"{scope} {token}\n" for scope, token in BY_SCOPE.items())
    served.write_tokens("read", "control", "weights", more=lines)
    yield served
    after = served.server.state()
    served.write_tokens("read", "control", "weights")
    assert [after[key] for key in ("state", "since", "weights")] == [
        before[key] for key in ("state", "since", "weights")
    ]


def send(
    server: EngineServer, method: str, target: bytes, token: str | None, body: bytes = GARBAGE
) -> RawAnswer:
    return raw_request(server.url, method, target, token=token, body=body)


def announce(server: EngineServer, method: str, target: bytes, token: str | None) -> RawAnswer:
    """100 MB are announced and not a byte of them is sent."""
    return raw_request(server.url, method, target, token=token, unsent_bytes=100_000_000)


def acted(answer: RawAnswer) -> bool:
    """Whether a route of ours ran: it answered, or found fault with the body."""
    ours = answer.problem or answer.status < 300
    shut = answer.status in {0, *DENIED} or answer.code == "closed_route"
    return bool(ours) and not shut


def read_by_the_book(target: bytes) -> str:
    """The path of a target as RFC 3986 has it, below the prefix; empty if it is not below it.

    A target may name an origin before the path (RFC 9112, absolute form), as proxies send it.
    """
    target = re.sub(rb"^https?://[^/?#]*", b"", target, count=1)
    path = unquote_to_bytes(target.split(b"?")[0].split(b"#")[0])
    return path.removeprefix(PREFIX).decode("latin-1") if path.startswith(PREFIX) else ""


def judge(served: Served, method: str, target: bytes, scope: str) -> None:
    """Send it with a token of a scope and hold the answer against the book."""
    answer = send(served.server, method, target, BY_SCOPE[scope])
    route = "GET" if method == "HEAD" else method
    needed = SCOPES.get((route, read_by_the_book(target)))
    told = f"{method} {target!r} with {scope}: {answer.status} {answer.text[:200]}"
    if acted(answer):
        # The document is the one route that any token opens.
        assert needed == scope or read_by_the_book(target) == "/openapi.json", told
    # An engine may redirect to a route of its own.
    assert "/admin/v1" not in answer.headers.get("location", ""), told
    assert answer.status != 500, told


NOISE = st.sampled_from(
    [
        *(b"/", b"//", b"%2f", b"%2F", b"%5c", b"\\", b"/.", b"/..", b"/./", b";", b";x=1", b"%3b"),
        *(b"%0a", b"%0A", b"%0d%0a", b"%00", b"%09", b"%20", b"%7f", b"%85", b"%e2%80%a8", b"\t"),
        *(b"?", b"?x=/pause", b"#", b"#/state", b"%3f", b"%23", b"%25", b"%250a", b"%252f", b"*"),
        *(b"\n", b"\x00", b"\x7f", b"\xff", b"%c0%af", b"%u002f", b"%", b"%zz"),
    ]
)
CASES = st.sampled_from([bytes.upper, bytes.title, lambda each: each])


def encoded(path: bytes, places: set[int]) -> bytes:
    """The same path with some characters percent-encoded."""
    return b"".join(
        b"%%%02x" % byte if place in places else bytes([byte]) for place, byte in enumerate(path)
    )


@st.composite
def targets(draw: st.DrawFn) -> bytes:
    """A route's path, mangled in up to four places, below one spelling of the prefix or another."""
    path = draw(st.sampled_from(PATHS)).encode()
    path = encoded(path, draw(st.sets(st.integers(0, len(path) - 1), max_size=2)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(path)))
        path = path[:place] + draw(NOISE) + path[place:]
    prefix = draw(st.sampled_from([PREFIX] * 4 + [b"/" + PREFIX, PREFIX + b"/", b"/ADMIN/v1", b""]))
    origin = draw(st.sampled_from([b""] * 4 + [b"http://evil.example", b"http://u:p@h:1", b"//x"]))
    return origin + prefix + draw(CASES)(path)


@given(target=targets(), method=st.sampled_from(METHODS), scope=st.sampled_from(sorted(BY_SCOPE)))
@example(target=b"http://h" + PREFIX + b"/memory", method="GET", scope="read")
@example(target=PREFIX + b"//pause%0A", method="POST", scope="read")
@example(target=b"http://evil.example/admin/v1//pause%0A", method="POST", scope="read")
@example(target=PREFIX + b"//weights/update%0A", method="POST", scope="control")
@example(target=b"/pause/", method="GET", scope="control")  # a route of vLLM's own
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_a_target_looks_like(
    guarded: Served, target: bytes, method: str, scope: str
) -> None:
    """No spelling of a path and no method runs a route with another route's scope."""
    judge(guarded, method, target, scope)


@pytest.mark.parametrize("around", [b"/%s%%0A", b"/%s%%0a", b"%s%%0A", b"/%s", b"%s/", b"%s%%2f"])
def test_a_spelling_that_only_a_router_understands_is_no_route(
    guarded: Served, around: bytes
) -> None:
    """A final newline and a doubled slash were read by the router and not by the scope check."""
    for method, path in ROUTES:
        target = PREFIX + around % path.encode()
        for scope in BY_SCOPE:
            answer = send(guarded.server, method, target, BY_SCOPE[scope])
            assert (answer.status, answer.code) == (404, "unknown_route"), (method, target)
        assert send(guarded.server, method, target, "nobody's").status == 401


def test_what_matches_no_route_is_denied_before_its_body_is_read(guarded: Served) -> None:
    """Whatever the token; a wrong method names those that there are."""
    for target in (b"/nowhere", b"/zz/weights/sources", b"", b"/", b"/docs", b"/redoc"):
        for token, expected in ((TOKEN, (404, "unknown_route")), (None, (401, "unauthorized"))):
            answer = announce(guarded.server, "POST", PREFIX + target, token)
            assert (answer.status, answer.code) == expected, target
    wrong = announce(guarded.server, "DELETE", PREFIX + b"/prefill-gate", TOKEN)
    assert (wrong.status, wrong.code) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET, HEAD, PATCH"
