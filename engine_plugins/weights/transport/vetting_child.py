"""Load peers' metadata in a process that may crash; started by `vetting.py`, never imported.

It imports nothing of ours and no torch, so that it is there in half a second.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any


def main() -> None:
    """Say the number of each piece of metadata before it is loaded, then that all are through."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # UCX writes its log lines to stdout
    asked = json.loads(sys.stdin.buffer.readline())
    signal.alarm(asked["deadline_s"])  # also where the engine is gone
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    agent = _agent(asked["bindings"])
    for index, nbytes in enumerate(asked["sizes"]):
        metadata = sys.stdin.buffer.read(nbytes)
        said.write(f"{index}\n")
        said.flush()
        try:
            named = agent.loadRemoteMD(metadata)
            agent.invalidateRemoteMD(named.decode(errors="replace"))
        except Exception as error:  # NIXL's own refusal: the engine will meet it too, and name it
            sys.stderr.write(f"{index}: {type(error).__name__}: {error}\n")
    said.write("end\n")
    said.flush()
    os._exit(0)  # no farewell to peers that were never spoken to


def _agent(bindings_file: str) -> Any:
    # By its file, without its package, which imports torch.
    loader = ExtensionFileLoader("_bindings", bindings_file)
    spec = spec_from_loader("_bindings", loader)
    bindings = module_from_spec(spec)  # type: ignore[arg-type]
    loader.exec_module(bindings)
    config = bindings.nixlAgentConfig()
    config.useProgThread = False
    config.useListenThread = False
    agent = bindings.nixlAgent(f"vetting-{os.getpid()}", config)
    agent.createBackend("UCX", {})
    return agent


if __name__ == "__main__":
    main()
