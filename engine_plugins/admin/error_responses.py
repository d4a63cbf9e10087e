"""Errors as HTTP: the one place where a class becomes a status. RFC 9457 throughout."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from engine_plugins import errors
from engine_plugins.errors import (
    ConflictError,
    EnginePluginError,
    MemoryPressureError,
    PromptTooLargeError,
)

__all__ = ["codes_of", "problem", "problem_from", "status_of"]

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
    errors.EngineDeadError: 503,
    errors.EngineStuckError: 504,
    errors.OutdatedError: 503,
    errors.WriterStoppedError: 503,
    errors.PauseTimeoutError: 504,
    errors.TransferTimeoutError: 504,
    errors.ResidualMemoryError: 507,
    errors.SleepRefusedError: 507,
    errors.ServerFilesError: 503,
}

_RETRY_AFTER_S: dict[type[EnginePluginError], int] = {
    errors.PauseTimeoutError: 5,
    errors.TransferTimeoutError: 5,
}
"""Seconds after which the same call may well succeed; for most errors waiting alone is no help."""
_UPDATE_RETRY_S = 1


def status_of(error: EnginePluginError) -> int:
    """The HTTP status of an error: that of its nearest class in the table, else 500."""
    return _status_of(type(error))


_OTHER_CODES = {
    401: ["unauthorized"],
    403: ["forbidden"],
    408: ["body_stalled"],
    500: ["internal_error"],
}
"""Codes that no class of the tree has."""


def codes_of(status: int) -> list[str]:
    """Codes that an answer of this status may have."""
    kinds = _all_kinds(EnginePluginError)
    found = {kind.code for kind in kinds if _status_of(kind) == status}
    return [*_OTHER_CODES.get(status, ()), *sorted(found)]


def _status_of(kind: type[EnginePluginError]) -> int:
    return next((_STATUS[base] for base in kind.__mro__ if base in _STATUS), 500)


def _all_kinds(kind: type[EnginePluginError]) -> list[type[EnginePluginError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in _all_kinds(child))]


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
    if isinstance(error, PromptTooLargeError):
        more["largest_prompt"] = error.largest_prompt
    retry_after_s = _retry_after_s(error, state)
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return problem(
        status_of(error),
        error.code,
        error.message,
        remedy=error.remedy,
        state=state,
        headers=headers,
        **more,
    )


def _retry_after_s(error: EnginePluginError, state: str | None) -> int | None:
    if isinstance(error, MemoryPressureError):
        return error.retry_after_s
    # What an update stands in the way of is possible once it has ended.
    if error.code == ConflictError.code and state == "updating":
        return _UPDATE_RETRY_S
    return next(
        (_RETRY_AFTER_S[kind] for kind in type(error).__mro__ if kind in _RETRY_AFTER_S), None
    )
