"""Judges models one after the other, each in a process that begins with its engine imported.

What a model does to its process (a crash in a kernel, a hang) is that model's result and no
other's.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.families.family import Case
from tests.families.judge import FAILED, Verdict
from tests.support.preloaded import Nursery, PreloadedProcess, preloaded
from tests.support.sglang_server import ON_CPU
from tests.support.vllm_server import QUIET

__all__ = ["LIMIT_S", "judged"]

LIMIT_S = 300.0
"""Of one model; most take 4 to 10 s. vLLM builds phimoe in a minute of a core, several times."""

_QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_OF_ENGINE = {"vllm": QUIET, "sglang": ON_CPU}


def _nursery(kind: str) -> Nursery:
    """Where judges of an engine begin; once for a process, and it ends with it."""
    return preloaded(
        f"tests.support.loader_maps_{kind}", "transformers", **_QUIET, **_OF_ENGINE[kind]
    )


def judged(kind: str, case: Case, folder: Path, *, limit_s: float = LIMIT_S) -> Verdict:
    """Have a process of its own judge one model of an engine.

    Args:
        kind: the engine, which is installed here.
        case: the model and its dtype.
        folder: where its verdict and its output go, under names of their own.
        limit_s: after which the process is ended, and the model has failed.
    """
    name = f"{kind}-{case.name}"
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    file.unlink(missing_ok=True)
    program = ["-m", "tests.families.judge", kind, case.family.name, case.way, str(file)]
    process = _started(kind, program, log)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return Verdict(result=FAILED, why=f"no verdict within {limit_s:.0f} s")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
    if code or not file.exists():
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return Verdict(result=FAILED, why=" ".join([f"the process ended with {code}:", *last]))
    return Verdict(**json.loads(file.read_text()))


def _started(kind: str, program: list[str], log: Path) -> PreloadedProcess:
    environment = {**os.environ, **_QUIET, **_OF_ENGINE[kind], "TMPDIR": str(log.parent)}
    with log.open("w") as output, open(os.devnull) as nothing:
        files = (nothing.fileno(), output.fileno(), output.fileno())
        return PreloadedProcess(_nursery(kind), program, environment=environment, files=files)
