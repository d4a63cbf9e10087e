"""Which updates may begin, and how much of one is here before its engine is paused."""

from __future__ import annotations

from engine_plugins.admin.schemas import UpdateBody
from engine_plugins.admin.state import EngineState
from engine_plugins.errors import ConflictError, StaleVersionError, UnsupportedError
from engine_plugins.weights.contract.report import PlanSummary
from engine_plugins.weights.receiving.staging import ModeChoice

__all__ = ["mode_in_two_phases", "refuse_partial", "refuse_push", "refuse_stale", "refuse_verify"]


def mode_in_two_phases(body: UpdateBody, plan: PlanSummary) -> ModeChoice:
    """Staged: the old weights serve until the commit; unless a push goes into live parameters.

    Raises:
        UnsupportedError: the mode that was asked for cannot be had with this plan.
    """
    if plan.direction == "push" and plan.direct_bytes:
        if body.mode == "staged":
            raise UnsupportedError(
                f"this push writes {plan.direct_bytes} bytes into live parameters, so the old "
                "weights cannot serve until the commit",
                remedy="prepare with mode auto or in_place",
            )
        return ModeChoice(False, "a push into live parameters")
    if body.mode == "in_place" and plan.direction == "pull":
        raise UnsupportedError(
            "what is prepared waits in a receive buffer: that is mode staged",
            remedy="prepare with mode auto or staged, or POST /admin/v1/weights/update",
        )
    return ModeChoice(True, "what is prepared waits for its commit")


def refuse_verify(body: UpdateBody) -> None:
    """Refuse a check of what was installed, which is not built yet.

    Raises:
        UnsupportedError: one was asked for.
    """
    if body.verify != "none":
        raise UnsupportedError(
            f"verify {body.verify} is not built yet", remedy="update with verify none"
        )


def refuse_push(plan: PlanSummary) -> None:
    """Refuse an update in one call from the plan of a push.

    Raises:
        ConflictError: it is one.
    """
    if plan.direction == "push":
        raise ConflictError(
            f"{plan.plan_id} is a push: its trainer writes before anything is installed",
            remedy="POST /admin/v1/weights/prepare, write, then /admin/v1/weights/commit",
        )


def refuse_stale(state: EngineState, body: UpdateBody) -> None:
    """Refuse a version that is not newer than what the engine has, or had half of.

    Raises:
        StaleVersionError: it is not, and `force` is not set.
    """
    if body.force:
        return
    if state.fence is not None:
        if body.version < state.fence.attempted_version:
            raise StaleVersionError(
                f"version {body.version} is older than {state.fence.attempted_version}, whose "
                "update failed half way",
                remedy="repeat that version or send a newer one, or set force",
            )
    elif state.weights.version is not None and body.version <= state.weights.version:
        raise StaleVersionError(
            f"version {body.version} is not newer than the installed {state.weights.version}",
            remedy="send a newer version, or set force",
        )


def refuse_partial(state: EngineState, plan: PlanSummary, *, holds_nothing: bool) -> None:
    """Refuse an update of parts where the rest is no model's weights.

    Args:
        state: of the engine.
        plan: of the update.
        holds_nothing: whether the engine was started without weights (load format dummy).

    Raises:
        ConflictError: they were discarded, are half of an update, or were never loaded.
    """
    if not any(rank.parameters_left for rank in plan.ranks):
        return
    if state.sleep is not None and state.sleep.weights_lost:
        why = "the weights were discarded"
    elif state.fence is not None:
        why = f"the engine is fenced ({state.fence.code}: {state.fence.detail})"
    elif holds_nothing and state.weights.version is None:
        why = "the engine was started without weights (load format dummy)"
    else:
        return
    raise ConflictError(
        f"this plan leaves out parameters, and {why}: they would hold no model's values",
        remedy="send every tensor first (a sender without only=), then parts again",
    )
