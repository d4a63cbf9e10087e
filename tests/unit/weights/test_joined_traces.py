"""Two models that are loaded from the same tensors, as one trace."""

from __future__ import annotations

import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.joined_traces import with_draft
from engine_plugins.weights.loader.loader_trace import LoaderTrace, trace_loader


def traced(*names: str) -> LoaderTrace:
    """A model with a parameter of each name, which its loader fills by name."""
    parameters = {name: torch.empty(2, device="meta") for name in names}

    def load(weights: object) -> None:
        for name, weight in weights:  # type: ignore[attr-defined]
            if name in parameters:
                parameters[name].copy_(weight)

    every = [
        LogicalTensor(name=name, shape=(2,), dtype=torch.float32)
        for name in ("embed.w", "body.w", "mtp.w")
    ]
    return trace_loader(parameters, load, every)


def test_what_the_draft_shares_is_filled_by_the_target_alone() -> None:
    """The embedding lands once; the draft's own parameter has a name that the target has not."""
    joined = with_draft(traced("embed.w", "body.w"), traced("embed.w", "mtp.w"), {"mtp.w"})
    assert [(copy.sources, copy.parameter) for copy in joined.copies] == [
        (("embed.w",), "embed.w"),
        (("body.w",), "body.w"),
        (("mtp.w",), "draft.mtp.w"),
    ]
    assert joined.covered_numel() == joined.parameter_numel
    assert set(joined.layouts) == set(joined.parameter_numel)


def test_a_draft_that_nothing_fills_shows_as_uncovered() -> None:
    joined = with_draft(traced("embed.w"), traced("lost.w"), {"lost.w"})
    assert joined.covered_numel() == {"embed.w": 2, "draft.lost.w": 0}
    assert joined.parameter_numel == {"embed.w": 2, "draft.lost.w": 2}
