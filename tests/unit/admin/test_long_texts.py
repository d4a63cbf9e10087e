"""An error's text may be of any length and hold anything; what follows from it holds all the same.

A compiler's output or a list of missing keys is longer than the page that processes share.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import MOST_TEXT_BYTES, Fence, Sleep, UpdateProgress, moved
from tests.support.admin_server import AdminServer
from tests.support.in_memory_model import hf_tensors
from tests.support.source_ranks import offered_tensors

pytestmark = pytest.mark.anyio

LETTERS = ["x", "\N{SNOWMAN}", "\N{GRINNING FACE}", "\udc80"]


@pytest.mark.parametrize("letter", LETTERS)
def test_a_state_of_the_longest_texts_fits(
    shared: SharedState, letter: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is cut, and says so; the whole of it is in the log."""
    text = letter * 100_000
    with caplog.at_level(logging.WARNING):
        fence = Fence(code=text, detail=text, remedy=text, attempted_version=1)
    assert caplog.text.count(letter * 1000) or letter == "\udc80"
    sleep = Sleep(level=1, released=[], since=0.0, resume=True, verdict=text, reason=text)
    update = UpdateProgress(
        request_id=text, version=1, phase=text, bytes_done=0, bytes_total=1 << 60
    )
    state = shared.change(lambda now: moved(now, "fenced", fence=fence, sleep=sleep, update=update))
    assert SharedState(shared.runtime_dir).read() == state
    for cut in (fence.detail, sleep.reason, update.request_id):
        assert cut is not None
        assert len(cut.encode()) <= MOST_TEXT_BYTES
        assert cut.endswith("bytes, all of them in the server's log)")
        assert cut.startswith(letter.encode(errors="backslashreplace").decode() * 100)


def test_short_texts_stay_as_they_are() -> None:
    """Letters of any kind."""
    for text in ("", "plain", "\N{SNOWMAN}" * 1000, "x" * MOST_TEXT_BYTES):
        fence = Fence(code=text, detail=text, remedy=text, attempted_version=1)
        assert fence.detail == text


@pytest.mark.parametrize("letter", LETTERS[:3])
async def test_an_update_that_fails_with_a_long_text_leaves_a_fence(
    make_server: Callable[..., AdminServer], letter: str
) -> None:
    """And held requests end; the whole text comes with the answer, and a good update repairs."""
    server = make_server()
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        async with server.running():
            plan_id = await server.plan(trainer.manifest)
            installer = server.engine.ranks[0].installer
            right, request = installer.install, server.engine.submit(1, max_tokens=10**6)

            def fails(*arguments: object) -> object:
                raise RuntimeError(letter * 300_000)

            installer.install = fails  # type: ignore[method-assign, assignment]
            asked = {"plan_id": plan_id, "version": 1, "request_id": "r"}
            answer = await server.post("/weights/update", **asked)
            assert answer.status_code == 500
            assert letter * 300_000 in answer.json()["detail"]
            fence = (await server.state())["fence"]
            assert "half way" in fence["detail"]
            assert "server's log" in fence["detail"]
            await asyncio.wait_for(request.ended.wait(), 5)
            again = await server.post("/weights/update", **asked)
            assert again.json()["detail"] == answer.json()["detail"]
            installer.install = right  # type: ignore[method-assign]
            repaired = await server.post("/weights/update", plan_id=plan_id, version=1)
            assert repaired.status_code == 200
            assert server.engine.serves(seed=1)
