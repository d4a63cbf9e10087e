"""Whether a vLLM server asked for us, found out without loading anything of ours or of vLLM's.

vLLM loads plugins in every process of every server of an environment, before the arguments are
known. So this is all that runs in a server that did not ask.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = [
    "OURS",
    "RUNTIME_DIR",
    "asks_for_us",
    "begins_like_ours",
    "forget_other_server",
    "has_extension",
]

OURS = "engine_plugins"
"""Our name in vLLM's additional configuration."""
_PREFIX = "ENGINE_PLUGINS_"
RUNTIME_DIR = _PREFIX + "RUNTIME_DIR"
_OF_ONE_SERVER = (
    RUNTIME_DIR,
    _PREFIX + "RUNTIME_OWNER",
    _PREFIX + "NO_PREFILL_GATE",
)
_GATE = _PREFIX + "PREFILL_GATE"


def asks_for_us(arguments: Any) -> bool:
    """Whether vLLM's engine arguments, or the environment, name anything of ours."""
    config = arguments.additional_config
    return (
        has_extension(arguments.worker_extension_cls)
        or (isinstance(config, Mapping) and any(begins_like_ours(str(each)) for each in config))
        or os.environ.get(_GATE, "").lower() not in ("", "off")
    )


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


def begins_like_ours(name: str) -> bool:
    """Whether a name in the additional configuration is ours, perhaps misspelt."""
    return name.lower().replace("-", "_").startswith(OURS)


def forget_other_server() -> None:
    """Forget what was inherited of a server: what this process starts belongs to none of ours."""
    for name in _OF_ONE_SERVER:
        os.environ.pop(name, None)
