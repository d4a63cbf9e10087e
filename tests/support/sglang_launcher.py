"""`sglang.launch_server` as a function, for modules that change something in all its processes.

The children of a server import its main module again, so whatever such a module does at its top
is done in each of them.
"""

from __future__ import annotations

import os
import sys

from sglang import launch_server
from sglang.srt import plugins, server_args
from sglang.srt.utils import kill_process_tree

__all__ = ["launch"]


def launch() -> None:
    """Run a server with this process's arguments until it ends."""
    plugins.load_plugins()
    try:
        launch_server.run_server(server_args.prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
