"""Installs that a test can hold or fail, module by module and rank by rank, on every engine.

The server is started with `STEPPING_FOLDER` in its environment. Files in that folder do the rest:
`hold-<rank>-<n>` holds the rank before it installs its n-th module for as long as the file is
there, `fail-<rank>-<n>` makes that install raise once, with the file's text if it has any.
Everything else is the product.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine_plugins.weights.loader.weight_installer import WeightInstaller

__all__ = ["STEPPING_FOLDER", "Steps", "watch_installs"]

STEPPING_FOLDER = "STEPPING_FOLDER"


@dataclass(frozen=True)
class Steps:
    """The folder, from the test's side."""

    folder: Path

    def hold(self, rank: int, module: int) -> Path:
        """Hold a rank before a module until the file is removed."""
        path = self.folder / f"hold-{rank}-{module}"
        path.touch()
        return path

    def fail(self, rank: int, module: int, text: str = "") -> None:
        """Have a rank fail once at a module."""
        (self.folder / f"fail-{rank}-{module}").write_text(text)

    def clear(self) -> None:
        """Let everything go on."""
        for left in self.folder.iterdir():
            left.unlink()


def watch_installs(installer: WeightInstaller, rank: int) -> None:
    """Count the installs of a rank and look for a file before each, if a folder is named."""
    if STEPPING_FOLDER not in os.environ:
        return
    folder = Path(os.environ[STEPPING_FOLDER])
    install, landed, begin = installer.install, installer.landed, installer.begin
    count = 0

    def counted_begin() -> None:
        nonlocal count
        count = 0
        begin()

    def step() -> None:
        nonlocal count
        count += 1
        hold, fail = folder / f"hold-{rank}-{count}", folder / f"fail-{rank}-{count}"
        while hold.exists():
            time.sleep(0.01)
        if fail.exists():
            text = fail.read_text() or f"told to fail at module {count}"
            fail.unlink()
            raise RuntimeError(text)

    def watched_install(
        modules: Sequence[str], tensors: Sequence[tuple[str, torch.Tensor]]
    ) -> None:
        step()
        install(modules, tensors)

    def watched_landed(modules: Sequence[str]) -> None:
        step()
        landed(modules)

    installer.begin = counted_begin  # type: ignore[method-assign]
    installer.install, installer.landed = watched_install, watched_landed  # type: ignore[method-assign]
