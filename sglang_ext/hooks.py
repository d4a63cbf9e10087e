"""Our entries in SGLang's hook registry, and whether they took.

SGLang logs a hook that it cannot apply and goes on without it, so each process of ours counts.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine_plugins.engine_release import UPDATES

__all__ = ["install", "installed", "missing"]

_installed: list[tuple[str, str]] = []


def install(
    target: str, kind: HookType, function: Callable[..., object], *, part: str = UPDATES
) -> None:
    """Register a hook; SGLang applies it when all plugins of the process are loaded.

    Args:
        target: dotted name of SGLang's function.
        kind: how it is wrapped.
        function: ours.
        part: of us that needs the hook, as in `SGLANG.names`.
    """
    HookRegistry.register(target, function, kind)
    _installed.append((target, part))


def installed() -> set[str]:
    """Targets of this process, whether SGLang wrapped them or not."""
    return {target for target, _ in _installed}


def missing(part: str) -> list[str]:
    """Targets of this process that a part of us needs and SGLang did not wrap."""
    return [
        target for target, of in _installed if of == part and target not in HookRegistry._patched
    ]
