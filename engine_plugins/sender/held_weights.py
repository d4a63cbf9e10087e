"""What an engine holds after a failure, in words for people: never better than the engine says."""

from __future__ import annotations

from engine_plugins.admin_answers import EngineState
from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import AdminAnswerError, EnginePluginError

__all__ = ["ASKED_S", "held_by", "told_of"]


ASKED_S = 5.0


def held_by(client: AdminClient, *, timeout_s: float = ASKED_S) -> str:
    """Ask an engine for its state, and say which weights it holds; never raises.

    Args:
        client: of the engine.
        timeout_s: how long it may take; what failed before may be stopped for good.
    """
    try:
        return told_of(client.hurried(timeout_s).state())
    except EnginePluginError as error:
        if isinstance(error, AdminAnswerError) and error.code == "forbidden":
            return "unknown weights: the sender's token has no scope `read`, which /state wants"
        return f"unknown weights, /state gave no answer ({error.code})"


def told_of(state: EngineState) -> str:
    """Which weights an engine holds, by what it says of itself."""
    version = state.weights.version
    # Only an engine that has lost nothing holds what it was started with.
    weights = "the weights it started with" if version is None else f"version {version}"
    sleep, update, fence = state.sleep or {}, state.update, state.fence
    if fence is not None:
        return f"no whole version, fenced: {fence.get('detail', '')}"
    if sleep.get("weights_lost"):
        return f"no weights: a sleep discarded them, {state.state}"
    if state.state == "updating" and update is not None:
        if update.phase == "install":
            return f"a part of version {update.version}, which it is installing"
        return f"{weights}, and an update to version {update.version} is at {update.phase}"
    return f"{weights}, {state.state}"
