"""A refused prefill on its way from the engine's core to the client: an output, then an answer.

The core ends the request with finish reason `error`, and a stop reason that says why.
"""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError

from engine_plugins.errors import EnginePluginError, MemoryPressureError, PromptTooLargeError

__all__ = [
    "RefusedPrefillError",
    "answer_refusals",
    "answer_to",
    "refusal_of",
    "stop_reason_of",
]

_MARK = "engine_plugins: "


class RefusedPrefillError(GracefulHTTPError):
    """What vLLM turns into the answer: 413 for good, 503 for now."""

    def __init__(self, refusal: EnginePluginError) -> None:
        fits_never = isinstance(refusal, PromptTooLargeError)
        super().__init__(
            f"{refusal.message}; {refusal.remedy}",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE if fits_never else HTTPStatus.SERVICE_UNAVAILABLE,
        )
        self.headers: dict[str, str] = {}
        self.figures: dict[str, str | int] = {"code": refusal.code}
        if isinstance(refusal, PromptTooLargeError):
            self.figures["largest_prompt"] = refusal.largest_prompt
        elif isinstance(refusal, MemoryPressureError):
            self.headers["Retry-After"] = str(refusal.retry_after_s)


class _Told(msgspec.Struct, frozen=True, omit_defaults=True):
    message: str
    remedy: str
    largest_prompt: int | None = None
    retry_after_s: int = 1


def stop_reason_of(refusal: EnginePluginError) -> str:
    """A refusal as the stop reason of an output."""
    told = _Told(
        refusal.message,
        refusal.remedy,
        getattr(refusal, "largest_prompt", None),
        getattr(refusal, "retry_after_s", 1),
    )
    return _MARK + msgspec.json.encode(told).decode()


def refusal_of(stop_reason: object) -> EnginePluginError | None:
    """The refusal that a stop reason tells; `None` where it is none of ours."""
    if not isinstance(stop_reason, str) or not stop_reason.startswith(_MARK):
        return None
    told = msgspec.json.decode(stop_reason[len(_MARK) :], type=_Told)
    if told.largest_prompt is not None:
        return PromptTooLargeError(
            told.message, remedy=told.remedy, largest_prompt=told.largest_prompt
        )
    return MemoryPressureError(told.message, remedy=told.remedy, retry_after_s=told.retry_after_s)


def answer_refusals(app: FastAPI) -> None:
    """Have an application of vLLM answer refusals with their headers and figures.

    Its own answer has words only.
    """
    app.add_exception_handler(RefusedPrefillError, _answer)


def answer_to(error: Exception) -> JSONResponse:
    """What vLLM answers to an error, with what a refused prefill says beside its words."""
    body = create_error_response(error)
    told = error if isinstance(error, RefusedPrefillError) else None
    return JSONResponse(
        {**body.model_dump(), **(told.figures if told else {})},
        status_code=body.error.code,
        headers=told.headers if told else None,
    )


async def _answer(_: Request, error: Exception) -> JSONResponse:
    return answer_to(error)
