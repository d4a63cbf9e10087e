"""One trace of two models that an engine serves together: the target and the model that drafts."""

from __future__ import annotations

from collections.abc import Container

from engine_plugins.weights.loader.loader_trace import LoaderTrace

__all__ = ["DRAFT", "with_draft"]

DRAFT = "draft."
"""In front of the names of a draft model's parameters and modules."""


def with_draft(target: LoaderTrace, draft: LoaderTrace, own: Container[str]) -> LoaderTrace:
    """Put the copies into a draft model behind the target's, its parameters under `DRAFT`.

    Args:
        target: trace of the served model's own loader.
        draft: trace of the draft model's own loader.
        own: parameters of the draft model that it does not share with the target; what is shared
            is filled by the target's loader alone.
    """
    copies = tuple(
        copy._replace(parameter=DRAFT + copy.parameter)
        for copy in draft.copies
        if copy.parameter in own
    )
    read_by_draft = {name for copy in copies for name in copy.sources}
    return LoaderTrace(
        copies=target.copies + copies,
        # A tensor that only the draft model reads is given to it with the place of the whole.
        strided=target.strided - read_by_draft,
        whole=target.whole,
        parameter_numel={
            **target.parameter_numel,
            **{DRAFT + name: n for name, n in draft.parameter_numel.items() if name in own},
        },
        layouts={
            **target.layouts,
            **{DRAFT + name: each for name, each in draft.layouts.items() if name in own},
        },
    )
