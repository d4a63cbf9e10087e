"""A program that runs SGLang's `launch_server` in a process of its own, as trainers' frameworks do.

Nothing of ours is named on its command line, and it loads no plugins itself. The server can be
looked into, see `looked_into`.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys

from sglang.srt.entrypoints.http_server import launch_server
from sglang.srt.server_args import prepare_server_args

import tests.support.looked_into

__all__: list[str] = []

assert tests.support.looked_into.FOLDER

if __name__ == "__main__":
    arguments = prepare_server_args(sys.argv[1:])
    server = multiprocessing.get_context("spawn").Process(target=launch_server, args=(arguments,))
    server.start()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server ends, and this with it
    server.join()
