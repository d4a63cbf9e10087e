"""Our hooks in the processes of a vLLM server that asked for us, and whether they took.

A hook that cannot be installed is only noted here, and ends none but the servers that have our
worker extension.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from engine_plugins.errors import SettingsError, UnsupportedError
from engine_plugins.settings import Settings
from vllm_ext.asked import OURS, begins_like_ours

__all__ = [
    "hook_api_process",
    "hook_core",
    "install",
    "require_installed",
    "settings_of",
    "speak_through_vllm",
]

logger = logging.getLogger(__name__)

_lost: dict[str, str] = {}


def hook_api_process() -> None:
    """Install what belongs to the process that makes an engine's configuration.

    Of the core too: it may run in this process, or be forked from it.
    """
    hook_core()
    if "vllm.entrypoints.launchers.app" in sys.modules:
        install("vllm_ext.admin_mount", "hook_app")
        install("vllm_ext.admission_hook", "hook_admission")


def hook_core() -> None:
    """Install what belongs to an engine's core."""
    speak_through_vllm()
    install("vllm_ext.core_hooks", "hook_engine_core")
    install("vllm_ext.core_hooks", "hook_core_start")


def speak_through_vllm() -> None:
    """Hang our loggers below vLLM's, whose level and handlers are set later than this."""
    for name in ("engine_plugins", "vllm_ext"):
        logging.getLogger(name).parent = logging.getLogger("vllm")


def install(module: str, function: str, *, needed: bool = True) -> None:
    """Call one of our functions that install a hook; never raises.

    Args:
        module: of ours; importing it may fail too, where vLLM lacks a name.
        function: in it, without arguments.
        needed: whether servers with our extension must not start without the hook.
    """
    try:
        getattr(import_module(module), function)()
    except Exception as error:
        logger.warning("%s.%s failed: %s: %s", module, function, type(error).__name__, error)
        if needed:
            _lost[f"{module}.{function}"] = f"{type(error).__name__}: {error}"


def require_installed() -> None:
    """Check that every hook of this process is there.

    Raises:
        UnsupportedError: names those that are not, and why.
    """
    if _lost:
        told = "; ".join(f"{hook}: {why}" for hook, why in _lost.items())
        raise UnsupportedError(f"engine-plugins could not hook vLLM: {told}", remedy="see the log")


def settings_of(additional_config: Any, *, ours: bool) -> Settings:
    """The settings of a server; where nobody asked for us, bad ones are a line in the log.

    Args:
        additional_config: vLLM's.
        ours: whether the workers have our extension.

    Raises:
        SettingsError: a setting that does not exist, or has a value of the wrong kind.
    """
    known = additional_config if isinstance(additional_config, Mapping) else {}
    try:
        _refuse_misnamed(known)
        return Settings.load(known.get(OURS))
    except SettingsError as error:
        if ours or any(map(begins_like_ours, known)):
            # A traceback ends the server's output: what to do stands on a line of its own.
            error.add_note(f"engine-plugins: {error.remedy or 'mend --additional-config'}")
            raise
        logger.warning("engine-plugins leaves this server alone: %s", error)
        return Settings()


def _refuse_misnamed(additional_config: Mapping[str, Any]) -> None:
    for name in additional_config:
        if name != OURS and begins_like_ours(name):
            raise SettingsError(
                f"additional_config has {name}, which nobody reads", remedy=f"name it {OURS}"
            )
