"""Bringing one step of an update into the engine's model, by the shortest way that is proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine_plugins.weights.loader.weight_installer import WeightInstaller
from engine_plugins.weights.planning.plan_data import Step
from engine_plugins.weights.receiving.landing import Landing
from engine_plugins.weights.receiving.update_run import PreparedPlan

__all__ = ["install_step"]


def install_step(
    installer: WeightInstaller,
    landing: Landing,
    prepared: PreparedPlan,
    step: Step,
    index: int,
    *,
    may_land: bool,
) -> int:
    """Bring one step, which is here in full, into the model.

    Args:
        installer: the engine's side of loading.
        landing: what is known of its modules; it learns from what is loaded.
        prepared: where the step's bytes are.
        step: of the plan.
        index: the step's number.
        may_land: whether bytes may be put into live parameters past the loader at all.

    Returns:
        Bytes that were copied from the receive buffer without the loader.
    """
    if step.direct:
        installer.landed(step.modules)
        return 0
    tensors = prepared.tensors(index)
    if prepared.staged and may_land and landing.proven >= set(step.modules):
        landing.copy(step.modules, dict(tensors))
        installer.landed(step.modules)
        return step.bytes_needed
    installer.install(step.modules, tensors)
    _prove(installer, landing, step.modules, dict(tensors), may_land=may_land)
    return 0


def _prove(
    installer: WeightInstaller,
    landing: Landing,
    modules: Sequence[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    may_land: bool,
) -> None:
    """Find out of modules that were just loaded whether bytes may land in them.

    Where the new values show nothing, others are loaded for a moment: once in a start, and nearly
    always for small tensors alone (biases of zero, norms of one).
    """
    landing.compare(modules, tensors)
    pattern = landing.pattern(modules, tensors) if may_land else {}
    if not pattern:
        return
    shown = {**tensors, **pattern}
    installer.install(modules, list(shown.items()))
    landing.compare(modules, shown)
    installer.install(modules, list(tensors.items()))
