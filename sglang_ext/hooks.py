"""Our entries in SGLang's hook registry, and whether they took.

SGLang logs a hook that it cannot apply and goes on without it, so each process of ours counts.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

__all__ = ["install", "missing"]

_installed: list[str] = []


def install(target: str, kind: HookType, function: Callable[..., object]) -> None:
    """Register a hook; SGLang applies it when all plugins of the process are loaded."""
    HookRegistry.register(target, function, kind)
    _installed.append(target)


def missing() -> list[str]:
    """Targets of this process that SGLang did not wrap."""
    return [target for target in _installed if target not in HookRegistry._patched]
