"""Functions run in fresh processes that have imported torch and no more.

It is imported once in a run of the tests, by a program of which every case is a fork.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Environ", "run_after_import"]

_PROJECT = Path(__file__).parents[2]

Environ = Mapping[str, str | None]
"""What is put into the environment, and with `None` what is taken out of it."""


def run_after_import(
    function: Callable[..., Any], cases: Sequence[tuple[Environ, Sequence[Any]]]
) -> list[tuple[Any, str]]:
    """What a function of a test module gives for each (environment, arguments), and its stderr.

    The environment is added to this one's; arguments and answers must be JSON.
    """
    program = _program()
    assert program.stdin is not None
    assert program.stdout is not None
    request = {"module": function.__module__, "function": function.__name__, "cases": cases}
    program.stdin.write(json.dumps(request) + "\n")
    program.stdin.flush()
    return [(answer, said) for answer, said in json.loads(program.stdout.readline())]


@cache
def _program() -> subprocess.Popen[str]:
    """It ends with its stdin, so with this process."""
    command = [sys.executable, "-m", "tests.support.after_import"]
    return subprocess.Popen(
        command, cwd=_PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def main() -> None:
    importlib.import_module("torch")
    forks = multiprocessing.get_context("fork")
    for line in sys.stdin:
        request = json.loads(line)
        function = getattr(importlib.import_module(request["module"]), request["function"])
        answers = []
        for environ, arguments in request["cases"]:
            there, here = forks.Pipe()
            child = forks.Process(target=_answer, args=(here, function, environ, arguments))
            child.start()
            here.close()
            answers.append(there.recv())
            child.join()
        print(json.dumps(answers), flush=True)


def _answer(
    pipe: Any, function: Callable[..., Any], environ: Environ, arguments: Sequence[Any]
) -> None:
    for name, value in environ.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    with tempfile.TemporaryFile("w+") as said:
        os.dup2(said.fileno(), 2)
        answer = function(*arguments)
        sys.stderr.flush()
        said.seek(0)
        pipe.send((answer, said.read()))


if __name__ == "__main__":
    main()
