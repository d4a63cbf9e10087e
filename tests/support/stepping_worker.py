"""The real worker extension, made to hold or fail at a chosen module of a chosen rank.

A test that needs an update to stop half way on one rank serves with `STEPPING_EXTENSION` and
puts files in the folder named by `STEPPING_WORKER`: `hold-<rank>-<n>` holds the rank before it
installs its n-th module for as long as the file is there, `fail-<rank>-<n>` makes that install
raise once. Everything else is the product.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_ext.worker_extension import EnginePluginsWorkerExtension

FOLDER = "STEPPING_WORKER"
STEPPING_EXTENSION = "tests.support.stepping_worker.SteppingWorkerExtension"


class SteppingWorkerExtension(EnginePluginsWorkerExtension):
    """Counts installs of its rank and looks for a file before each."""

    def engine_plugins_call(self, call: str, arguments: bytes) -> bytes:
        """The product's call; the first one also puts the steps under watch."""
        first = getattr(self, "_engine_plugins_service", None) is None
        if first:
            super().engine_plugins_call("describe", b"\x80")
            _watch(self)
        return super().engine_plugins_call(call, arguments)


def _watch(worker: Any) -> None:
    installer = worker._engine_plugins_service._receiver._installer
    rank, folder = worker.rank, Path(os.environ[FOLDER])
    install, begin = installer.install, installer.begin
    count = 0

    def counted_begin() -> None:
        nonlocal count
        count = 0
        begin()

    def watched(modules: Sequence[str], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        nonlocal count
        count += 1
        hold, fail = folder / f"hold-{rank}-{count}", folder / f"fail-{rank}-{count}"
        while hold.exists():
            time.sleep(0.01)
        if fail.exists():
            fail.unlink()
            raise RuntimeError(f"told to fail at module {count}")
        install(modules, tensors)

    installer.begin, installer.install = counted_begin, watched
