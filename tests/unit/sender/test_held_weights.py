"""What a failure says of the weights that an engine holds."""

from __future__ import annotations

from typing import Any

import pytest

from engine_plugins.admin_client import AdminClient
from engine_plugins.sender.held_weights import held_by
from tests.support.fake_engine import TOKEN, FakeEngine, Refused

WHY = "the update to version 9 failed half way"
FENCE = {"detail": WHY, "attempted_version": 9}
PULL = {"request_id": "a", "version": 9, "phase": "pull", "bytes_done": 1, "bytes_total": 2}
LOST = {"level": 2, "released": ["weights"], "weights_lost": True}
KEPT = {"level": 1, "released": ["weights"], "weights_lost": False}


@pytest.mark.parametrize("version", [None, 8])
@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "{before}, serving"),
        ({"state": "paused"}, "{before}, paused"),
        ({"state": "asleep", "sleep": KEPT}, "{before}, asleep"),
        ({"state": "asleep", "sleep": LOST}, "no weights: a sleep discarded them, asleep"),
        # Awake again, and paused until an update brings weights.
        ({"state": "paused", "sleep": LOST}, "no weights: a sleep discarded them, paused"),
        ({"state": "fenced", "fence": FENCE}, f"no whole version, fenced: {WHY}"),
        (
            {"state": "updating", "update": PULL},
            "{before}, and an update to version 9 is at pull",
        ),
        (
            {"state": "updating", "update": PULL | {"phase": "install"}},
            "a part of version 9, which it is installing",
        ),
    ],
)
def test_it_says_no_more_than_the_engine_does(
    engine: FakeEngine, version: int | None, state: dict[str, Any], said: str
) -> None:
    """A version of null is that of the start only where nothing was lost since."""
    engine.version, engine.more_state = version, state
    before = "the weights it started with" if version is None else "version 8"
    with AdminClient(engine.url, token=TOKEN) as client:
        assert held_by(client) == said.format(before=before)


def test_a_token_that_may_not_ask_is_told_which_scope_it_lacks(engine: FakeEngine) -> None:
    engine.refuse["/state"] = Refused(403, "forbidden", "the token has no scope read")
    with AdminClient(engine.url, token=TOKEN) as client:
        assert "no scope `read`" in held_by(client)
    engine.refuse["/state"] = Refused(503, "not_configured", "no token is configured")
    with AdminClient(engine.url, token=TOKEN) as client:
        assert held_by(client) == "unknown weights, /state gave no answer (not_configured)"
