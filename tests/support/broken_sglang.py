"""A server with a part of SGLang broken in all its processes, see `sglang_launcher`.

`BROKEN_SGLANG` says what: `lost:<module>:<name>` takes a name out of a module, as another release
may; `unhookable:<target>` has SGLang fail to apply the hooks on a target, which it only logs.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from tests.support.sglang_launcher import launch


def _break() -> None:
    kind, _, what = os.environ["BROKEN_SGLANG"].partition(":")
    if kind == "lost":
        module, _, name = what.partition(":")
        delattr(import_module(module), name)
    else:
        _refuse_hooks_on(what)


def _refuse_hooks_on(refused: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    apply = HookRegistry._apply_target

    def apply_target(cls: type, target: str, hooks: list[Any]) -> None:
        if target == refused:
            raise RuntimeError("told to fail")
        apply(target, hooks)

    HookRegistry._apply_target = classmethod(apply_target)


_break()


if __name__ == "__main__":
    launch()
