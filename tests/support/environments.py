"""Programs of the tests that run in the environment of each engine, by starting themselves anew."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

from tests.support.engine_server import ROOT
from tests.support.sglang_server import SGLANG_SHIMS

__all__ = ["ENGINES", "in_environment", "is_here"]

ENGINES = ("vllm", "sglang")


def is_here(engine: str) -> bool:
    """Whether this process is in the environment of an engine."""
    shimmed = engine == "vllm" or str(SGLANG_SHIMS) in sys.path
    return find_spec(engine) is not None and shimmed


def in_environment(module: str, engine: str | None = None) -> int:
    """Run a module with this process's arguments in the environment of an engine; the exit code.

    Args:
        module: that is running.
        engine: None: the one that the arguments name.
    """
    arguments = sys.argv[1:] if engine is None else [*sys.argv[1:], "--engine", engine]
    engine = engine or arguments[arguments.index("--engine") + 1]
    shims = [] if engine == "vllm" else [SGLANG_SHIMS]
    environment = {
        **os.environ,
        "SGLANG_USE_CPU_ENGINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [*shims, ROOT, ROOT / "kernels"])),
    }
    python = ROOT / ".venv" / engine / "bin" / "python"
    return subprocess.run([str(python), "-m", module, *arguments], env=environment).returncode
