"""Our hooks in vLLM, and whether they took.

vLLM loads plugins in every process of every server of an environment. So a hook that cannot be
installed is only noted here, and ends none but the servers that have our worker extension.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from engine_plugins.errors import SettingsError, UnsupportedError
from engine_plugins.settings import Settings

__all__ = ["has_extension", "install", "require_installed", "settings_of"]

logger = logging.getLogger(__name__)

OURS = "engine_plugins"
"""Our name in vLLM's additional configuration."""
_lost: dict[str, str] = {}


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


def has_extension(worker_extension_cls: str | None) -> bool:
    """Whether a server's workers have our extension, or a class made of it."""
    if not worker_extension_cls:
        return False
    if worker_extension_cls.startswith("vllm_ext."):
        return True  # without importing what belongs to workers
    try:
        # Late: without this module no hook could be said to be missing.
        from vllm.utils.import_utils import resolve_obj_by_qualname

        return hasattr(resolve_obj_by_qualname(worker_extension_cls), "engine_plugins_call")
    except Exception:  # vLLM will say what is wrong with it
        return False


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
        if ours or any(map(_begins_like_ours, known)):
            # A traceback ends the server's output, and has an error's notes but not its remedy.
            error.add_note(f"engine-plugins: {error.remedy or 'mend --additional-config'}")
            raise
        logger.warning("engine-plugins leaves this server alone: %s", error)
        return Settings()


def _begins_like_ours(name: str) -> bool:
    return name.lower().replace("-", "_").startswith(OURS)


def _refuse_misnamed(additional_config: Mapping[str, Any]) -> None:
    for name in additional_config:
        if name != OURS and _begins_like_ours(name):
            raise SettingsError(
                f"additional_config has {name}, which nobody reads", remedy=f"name it {OURS}"
            )
