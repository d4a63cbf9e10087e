"""The servers of the rows: on a small disk of their own, some with installs that can fail."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.chaos_update.cases import ServerKind
from tests.chaos_update.fleet import Fleet, Target, runtime_dirs
from tests.chaos_update.models import Models
from tests.liveness.rows import SteppingKind
from tests.support.stepping import STEPPING_FOLDER, Steps

__all__ = ["LiveFleet", "folder_of_its_own_disk"]

DISK = "256m"
_WATCHED = {
    "vllm": {"extension": "tests.support.stepping_vllm.SteppingWorkerExtension"},
    "sglang": {"launcher": "tests.support.stepping_sglang"},
}


class LiveFleet(Fleet):
    """Servers that share one disk for temporary files.

    Args:
        folder: of logs, models and the steps of installs.
        disk: for temporary files.
    """

    def __init__(self, folder: Path, disk: Path) -> None:
        self._disk, self._steps = disk, folder / "steps"
        self._steps.mkdir(parents=True)
        super().__init__(Models(folder / "models"), folder, disk)
        self.stale: set[Path] = set()

    @property
    def steps(self) -> Steps:
        """Makes an install fail, on servers of which a row asks for it."""
        return Steps(self._steps)

    def target(self, kind: ServerKind) -> Target:
        """The running server of a kind; a new one must have cleared what dead ones left."""
        before = self.started
        found = super().target(kind)
        if self.started > before:
            self.stale |= runtime_dirs(self._disk) - {found.runtime_dir}
        return found

    def options(self, kind: ServerKind) -> dict[str, Any]:
        if not isinstance(kind, SteppingKind):
            return {}
        environment = {STEPPING_FOLDER: str(self._steps)}
        return {**_WATCHED[kind.engine], "environment": environment}


@contextlib.contextmanager
def folder_of_its_own_disk(folder: Path) -> Iterator[Path]:
    """A small disk that a test may fill, mounted on a new folder; it takes the right to mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=1777", "liveness", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
