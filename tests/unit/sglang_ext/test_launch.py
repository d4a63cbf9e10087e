"""Who signs SGLang's detokenizers in: the process that starts them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_plugins.admin.engine_processes import EngineProcesses
from sglang_ext import launch


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Three processes, as SGLang starts them."""
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [subprocess.Popen(sleeping) for _ in range(3)]
    yield processes
    for each in processes:
        each.kill()
        each.wait()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["detokenizer"], ["detokenizer"]),
        (
            ["detokenizer_0", "detokenizer_1", "detokenizer_router"],
            ["detokenizer rank 0", "detokenizer rank 1", "detokenizer router"],
        ),
    ],
)
def test_each_detokenizer_is_known_and_so_is_its_end(
    names: list[str],
    told: list[str],
    started: list[subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its own pid, and what SGLang gets is what it gave."""
    monkeypatch.setattr(launch, "ensure_runtime_dir", lambda: tmp_path)
    found = started[: len(names)]
    assert launch.launch_detokenizers(lambda: (found, names)) == (found, names)
    processes = EngineProcesses(tmp_path)
    pairs = zip(told, found, strict=True)
    assert processes.named() == ", ".join(f"{name} (pid {each.pid})" for name, each in pairs)
    assert processes.ended() == ""
    found[-1].kill()
    found[-1].wait()
    assert processes.ended() == f"{told[-1]} (pid {found[-1].pid}) has ended"
