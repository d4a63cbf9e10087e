"""A refused prefill on its way from SGLang's scheduler to the client: an abort, then an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from engine_plugins.admin.error_responses import status_of
from engine_plugins.errors import EnginePluginError, MemoryPressureError, PromptTooLargeError

__all__ = ["RefusedPrefill", "refusal_in"]

_LARGEST, _RETRY = "engine_plugins_largest_prompt", "engine_plugins_retry_after_s"


class RefusedPrefill(FINISH_ABORT):
    """The reason for which SGLang ends a request that the gate refused.

    Args:
        refusal: what `Decision.error` says.
    """

    def __init__(self, refusal: EnginePluginError) -> None:
        super().__init__(
            f"{refusal.message}; {refusal.remedy}", status_of(refusal), type(refusal).__name__
        )
        self._figures: dict[str, int] = {}
        if isinstance(refusal, PromptTooLargeError):
            self._figures[_LARGEST] = refusal.largest_prompt
        elif isinstance(refusal, MemoryPressureError):
            self._figures[_RETRY] = refusal.retry_after_s

    def to_json(self) -> dict[str, Any]:
        """As SGLang sends it to the API process."""
        return {**super().to_json(), **self._figures}


def refusal_in(finish_reason: Mapping[str, Any]) -> EnginePluginError | None:
    """The refusal that such a reason tells; `None` where it is none of ours."""
    message, _, remedy = str(finish_reason.get("message")).rpartition("; ")
    if _LARGEST in finish_reason:
        return PromptTooLargeError(
            message, remedy=remedy, largest_prompt=int(finish_reason[_LARGEST])
        )
    if _RETRY in finish_reason:
        return MemoryPressureError(message, remedy=remedy, retry_after_s=int(finish_reason[_RETRY]))
    return None
