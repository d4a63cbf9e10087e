"""Errors as HTTP: the one place where a class becomes a status. RFC 9457 throughout."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from engine_plugins import errors
from engine_plugins.errors import EnginePluginError, MemoryPressureError, PromptTooLargeError

__all__ = ["problem", "problem_from", "status_of"]

_STATUS: dict[type[EnginePluginError], int] = {
    errors.AdminRequestError: 400,
    errors.UnknownIdError: 404,
    errors.ConflictError: 409,
    errors.BodyTooLargeError: 413,
    errors.PromptTooLargeError: 413,
    errors.ManifestError: 422,
    errors.PlanError: 422,
    errors.WeightMismatchError: 422,
    errors.PeerError: 422,
    errors.UnsupportedError: 422,
    errors.RefusedSettingError: 422,
    errors.SettingsError: 503,
    errors.NotConfiguredError: 503,
    errors.PeerLostError: 503,
    errors.SourceRevokedError: 503,
    errors.MemoryPressureError: 503,
    errors.OutdatedError: 503,
    errors.WriterStoppedError: 503,
    errors.PauseTimeoutError: 504,
    errors.TransferTimeoutError: 504,
    errors.ResidualMemoryError: 507,
    errors.SleepRefusedError: 507,
}


def status_of(error: EnginePluginError) -> int:
    """The HTTP status of an error: that of its nearest class in the table, else 500."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    remedy: str = "",
    state: str | None = None,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    """An `application/problem+json` answer."""
    return JSONResponse(
        {
            "type": f"urn:engine-plugins:{code}",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": detail,
            "code": code,
            "state": state,
            "remedy": remedy,
            **more,
        },
        status_code=status,
        headers=dict(headers or {}),
        media_type="application/problem+json",
    )


def problem_from(error: EnginePluginError, *, state: str | None, **more: Any) -> JSONResponse:
    """The answer that an error becomes, with what a refused prefill says beside its words."""
    headers = {}
    if isinstance(error, PromptTooLargeError):
        more["largest_prompt"] = error.largest_prompt
    elif isinstance(error, MemoryPressureError):
        headers["Retry-After"] = str(error.retry_after_s)
    return problem(
        status_of(error),
        error.code,
        error.message,
        remedy=error.remedy,
        state=state,
        headers=headers,
        **more,
    )
