"""The one tree of errors.

A class exists where a caller would act differently; the text says what was seen, what
follows from it and what to do. `admin/error_responses.py` is the only place that turns
these into HTTP.
"""

from __future__ import annotations

__all__ = [
    "AdminAnswerError",
    "AdminRequestError",
    "BodyTooLargeError",
    "ConflictError",
    "EngineCallError",
    "EngineDeadError",
    "EnginePluginError",
    "EngineStuckError",
    "EngineTlsError",
    "EngineUnreachableError",
    "HookModeError",
    "ManifestError",
    "MemoryPressureError",
    "NotConfiguredError",
    "OutdatedError",
    "PauseTimeoutError",
    "PeerError",
    "PeerLostError",
    "PlanError",
    "PromptTooLargeError",
    "RefusedSettingError",
    "ResidualMemoryError",
    "ServerFilesError",
    "SettingsError",
    "SleepRefusedError",
    "SourceError",
    "SourceRevokedError",
    "StaleVersionError",
    "TransferTimeoutError",
    "TransportError",
    "UnknownIdError",
    "UnsupportedError",
    "UpdateAbortedError",
    "UpdateEndUnknownError",
    "UpdateFailedError",
    "WeightMismatchError",
    "WriterStoppedError",
]


class EnginePluginError(Exception):
    """Root of every error that this package raises on purpose.

    `code` is stable and machine readable; `remedy` says what the caller can do. Printed, an error
    says both: a traceback is often all that people see. Within another's text `message` is told.
    """

    code: str = "engine_plugin_error"

    def __init__(self, message: str, *, remedy: str = "") -> None:
        # Half a character, of a file's name say, has no place in an answer.
        self.message = message.encode(errors="backslashreplace").decode()
        super().__init__(self.message)
        self.remedy = remedy

    def __str__(self) -> str:
        told = hasattr(self, "__notes__")  # a server's start puts it on a line of its own
        return f"{self.message} [{self.remedy}]" if self.remedy and not told else self.message


class SettingsError(EnginePluginError):
    """A setting has a value that cannot be used."""

    code = "bad_setting"


class RefusedSettingError(SettingsError):
    """A caller wants to change a setting to a value that cannot be used; nothing has changed."""

    code = "refused_setting"


class HookModeError(SettingsError, RuntimeError):
    """The memory saver's hook mode, or the allocator's settings, would end this process."""

    code = "bad_hook_mode"


class NotConfiguredError(EnginePluginError):
    """Something that must be configured before use is not (an admin token, NIXL)."""

    code = "not_configured"


class AdminRequestError(EnginePluginError):
    """A request that cannot be read: not JSON, a missing field, a wrong type."""

    code = "malformed_request"


class BodyTooLargeError(EnginePluginError):
    """A request body over the configured limit."""

    code = "body_too_large"


class UnknownIdError(EnginePluginError):
    """A source_id or plan_id that this engine does not hold."""

    code = "unknown_id"


class ConflictError(EnginePluginError):
    """The call is right but not in this state; the message names the way out."""

    code = "illegal_state"


class StaleVersionError(ConflictError):
    """The version offered is not newer than the one installed."""

    code = "stale_version"


class OutdatedError(EnginePluginError):
    """Another process has taken the place of a call that did not go on; it changes nothing more."""

    code = "outdated"


class ServerFilesError(EnginePluginError):
    """The server cannot keep or read a file of its own; the engine is as it was."""

    code = "server_files"


class WriterStoppedError(EnginePluginError):
    """A process of the server stopped while it wrote the state; another can take its place."""

    code = "writer_stopped"


class UpdateAbortedError(ConflictError):
    """An update that was prepared was given up: by its caller, or because no commit came."""

    code = "update_aborted"


class UnsupportedError(EnginePluginError):
    """Well-formed and legal, but this engine or release cannot do it."""

    code = "unsupported"


class PauseTimeoutError(EnginePluginError):
    """A pause did not complete in time; the engine is back in its former state."""

    code = "pause_timeout"


class EngineCallError(EnginePluginError):
    """A worker of the engine answered a call with an error of its own."""

    code = "engine_call_failed"


class EngineDeadError(EngineCallError):
    """A process of the engine has ended, so nothing that it was asked will be answered."""

    code = "engine_dead"


class EngineStuckError(EnginePluginError):
    """The engine did not answer a call in time; the text names the process that stands still.

    It may still do what it was asked, once it goes on; nothing that comes late is published.
    """

    code = "engine_stuck"


class SourceError(EnginePluginError):
    """The trainer's tensors cannot be described as a source (unknown name, odd layout)."""

    code = "bad_source"


class ManifestError(EnginePluginError):
    """A manifest contradicts itself or breaks a bound."""

    code = "bad_manifest"


class PlanError(EnginePluginError):
    """The sources together do not give every element exactly once."""

    code = "bad_coverage"


class WeightMismatchError(EnginePluginError):
    """The sources do not fit the engine's model: a name, shape or dtype differs."""

    code = "weight_mismatch"


class TransportError(EnginePluginError):
    """The transport failed for a reason that is not a peer's."""

    code = "transport_failed"


class PeerError(TransportError):
    """A peer's description is unusable (truncated or foreign metadata, bad address)."""

    code = "bad_peer"


class PeerLostError(TransportError):
    """A peer died or closed its side while bytes were wanted from it."""

    code = "peer_lost"


class SourceRevokedError(TransportError):
    """A source took its offer back while it was read: what was read may be a mixture."""

    code = "source_revoked"


class TransferTimeoutError(TransportError):
    """Transfers passed their deadline, or nothing moved for too long.

    Attributes:
        stuck: some are still under way and may move bytes at any time: their buffers must not be
            used again.
    """

    code = "transfer_timeout"

    def __init__(self, message: str, *, remedy: str = "", stuck: bool = False) -> None:
        super().__init__(message, remedy=remedy)
        self.stuck = stuck


class UpdateFailedError(EnginePluginError):
    """A weight update did not complete; the text says what the engines hold now."""

    code = "update_failed"


class UpdateEndUnknownError(UpdateFailedError):
    """What became of an update cannot be found out, so the trainer's memory was taken back."""

    code = "update_end_unknown"


class EngineUnreachableError(EnginePluginError):
    """An engine's admin routes gave no answer: nothing listens, or it did not answer in time.

    Attributes:
        nobody_listens: no connection was made, so nothing was sent.
    """

    code = "engine_unreachable"

    def __init__(self, message: str, *, remedy: str = "", nobody_listens: bool = False) -> None:
        super().__init__(message, remedy=remedy)
        self.nobody_listens = nobody_listens


class EngineTlsError(EngineUnreachableError):
    """No TLS connection to an engine was made: who answers is not trusted, or does not trust us.

    Nothing was sent, the token neither, and trying again does not help.
    """

    code = "engine_tls"


class AdminAnswerError(EnginePluginError):
    """An engine's admin routes answered with an error, told here as the engine said it.

    Attributes:
        url: the engine's base url.
        status: the HTTP status.
        code: the engine's own code for the error (`stale_version`), or `admin_answer`.
        state: the engine's state (`serving`, `fenced`), or empty.
        detail: what the engine saw.
        remedy: what the engine advises.
        by_engine: whether the engine itself said it; a gateway's error page says nothing of what
            the engine does.
    """

    code = "admin_answer"

    def __init__(
        self,
        *,
        url: str,
        status: int,
        code: str,
        state: str,
        detail: str,
        remedy: str,
        by_engine: bool = True,
        retry_after: bool = False,
    ) -> None:
        at = f"{status} {code}" + (f", {state}" if state else "")
        super().__init__(f"{url} answered {at}: {detail}", remedy=remedy)
        self.url = url
        self.status = status
        self.code = code
        self.state = state
        self.detail = detail
        self.by_engine = by_engine
        self.retry_after = retry_after


class SleepRefusedError(EnginePluginError):
    """Memory cannot be released or mapped; nothing has been."""

    code = "sleep_refused"


class ResidualMemoryError(EnginePluginError):
    """An engine sleeps, and more of its memory is resident than may be.

    Attributes:
        memory: the whole report, as GET /memory gives it.
    """

    code = "residual_memory"

    def __init__(self, message: str, *, remedy: str = "", memory: object = None) -> None:
        super().__init__(message, remedy=remedy)
        self.memory = memory


class PromptTooLargeError(EnginePluginError):
    """A prompt whose prefill this engine can never hold in memory.

    Attributes:
        largest_prompt: tokens of the largest prompt of this kind that fits.
    """

    code = "prompt_too_large"

    def __init__(self, message: str, *, remedy: str = "", largest_prompt: int = 0) -> None:
        super().__init__(message, remedy=remedy)
        self.largest_prompt = largest_prompt


class MemoryPressureError(EnginePluginError):
    """A prompt that found no memory in time, and that may fit later.

    Attributes:
        retry_after_s: seconds after which it is worth another try.
    """

    code = "memory_pressure"

    def __init__(self, message: str, *, remedy: str = "", retry_after_s: int = 1) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s
