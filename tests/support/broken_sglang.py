"""A server with a part of SGLang broken in all its processes, see `sglang_launcher`.

`BROKEN_SGLANG` says what. `wanted:<part>:<module>:<entry>` has a part of us want something that
SGLang has not, as if it were another release; `unhookable:<target>` has SGLang fail to apply the
hooks on a target, which it only logs.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from sglang_ext.versions import SGLANG
from tests.support.sglang_launcher import launch


def _break() -> None:
    kind, _, what = os.environ["BROKEN_SGLANG"].partition(":")
    if kind == "wanted":
        part, module, entry = what.split(":")
        names = SGLANG.names[part]
        SGLANG.names[part] = replace(names, used={**names.used, module: [entry]})  # type: ignore[index]
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
