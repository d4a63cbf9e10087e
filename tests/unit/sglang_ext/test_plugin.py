"""Which processes of which servers get anything of ours; in real processes, by what they load."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

TELL = """
import json, sys, types
{before}
sys.modules["sglang_ext.process_hooks"] = hooks = types.ModuleType("process_hooks")
called = []
for name in ("hook_first_process", "hook_api_process", "hook_scheduler"):
    setattr(hooks, name, lambda name=name: called.append(name))
from sglang_ext.plugin import register
register()
ours = [name for name in sys.modules if name.partition(".")[0] in ("engine_plugins", "sglang_ext")]
print(json.dumps([called, sorted(ours)]))
"""
LAUNCHER = "sys.modules['sglang.srt.entrypoints.engine'] = types.ModuleType('engine')"
CHILD = "import multiprocessing.process as p; p._parent_process = object()"
FLAG = ["--engine-plugins-enable"]
ENABLED = {"ENGINE_PLUGINS_ENABLE": "1"}


def _told(
    environment: Mapping[str, str], arguments: list[str], before: str
) -> tuple[list[str], list[str]]:
    plain = {key: value for key, value in os.environ.items() if "ENGINE_PLUGINS" not in key}
    said = subprocess.run(
        [sys.executable, "-c", TELL.format(before=before), *arguments],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    called, ours = json.loads(said.stdout.strip().splitlines()[-1])
    return called, ours


@pytest.mark.parametrize(
    ("environment", "arguments", "before", "hooks"),
    [
        ({}, [], "", None),
        ({"ENGINE_PLUGINS_ENABLE": "0"}, [], "", None),
        ({"ENGINE_PLUGINS_RUNTIME_DIR": "/another"}, [], f"{CHILD}; {LAUNCHER}", None),
        ({}, FLAG, "", "hook_first_process"),
        (ENABLED, [], "", "hook_first_process"),
        (ENABLED, [], f"{CHILD}; {LAUNCHER}", "hook_first_process"),
        (ENABLED, FLAG, CHILD, None),
        ({}, FLAG, f"{CHILD}; {LAUNCHER}", None),
        ({**ENABLED, "ENGINE_PLUGINS_RUNTIME_ROLE": "scheduler"}, [], CHILD, "hook_scheduler"),
    ],
    ids=[
        "a stock server",
        "switched off",
        "a stock server that a launcher of ours starts",
        "by a flag",
        "by the environment",
        "in a process of a launcher",
        "a detokenizer",
        "in a process of a launcher that has a flag of its own",
        "a scheduler",
    ],
)
def test_who_is_hooked(
    environment: dict[str, str], arguments: list[str], before: str, hooks: str | None
) -> None:
    called, ours = _told(environment, arguments, before)
    assert called == ([] if hooks is None else [hooks])
    if hooks is None:
        assert set(ours) == {"sglang_ext", "sglang_ext.plugin", "sglang_ext.process_hooks"}


def test_the_parent_of_a_process_is_known_as_it_is_made_up_here() -> None:
    """By the name that multiprocessing keeps it under."""
    assert hasattr(multiprocessing.process, "_parent_process")
