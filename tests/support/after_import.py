"""Functions run in fresh processes that have imported torch and no more.

It is imported once in a run of the tests, by a program of which every case is a fork. What only the
start of a process reads (LD_PRELOAD) takes a program of its own.
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
from io import TextIOWrapper
from pathlib import Path
from typing import Any

__all__ = ["Environ", "run_after_import"]

_PROJECT = Path(__file__).parents[2]

Environ = Mapping[str, str | None]
"""What is put into the environment, and with `None` what is taken out of it."""


def run_after_import(
    function: Callable[..., Any],
    cases: Sequence[tuple[Environ, Sequence[Any]]],
    *,
    at_start: Mapping[str, str] | None = None,
) -> list[tuple[Any, str]]:
    """What a function of a test module gives for each (environment, arguments), and its stderr.

    The environment is added to this one's; arguments and answers must be JSON. A function that ends
    its process gives `{"exit": status}`, negative where a signal did it.
    """
    program = _program(tuple(sorted((at_start or {}).items())))
    assert program.stdin is not None
    assert program.stdout is not None
    request = {"module": function.__module__, "function": function.__name__, "cases": cases}
    program.stdin.write(json.dumps(request) + "\n")
    program.stdin.flush()
    return [(answer, said) for answer, said in json.loads(program.stdout.readline())]


@cache
def _program(at_start: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """It ends with its stdin, so with this process."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.after_import"],
        cwd=_PROJECT,
        env={**os.environ, **dict(at_start)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
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
            with tempfile.TemporaryFile("w+") as said:
                work = (here, said, function, environ, arguments)
                child = forks.Process(target=_answer, args=work)
                child.start()
                here.close()
                try:
                    answer = there.recv()
                except EOFError:
                    child.join()
                    answer = {"exit": child.exitcode}
                child.join()
                said.seek(0)
                answers.append((answer, said.read()))
        print(json.dumps(answers), flush=True)


def _answer(
    pipe: Any,
    said: TextIOWrapper,
    function: Callable[..., Any],
    environ: Environ,
    arguments: Sequence[Any],
) -> None:
    for name, value in environ.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.dup2(said.fileno(), 2)
    pipe.send(function(*arguments))


if __name__ == "__main__":
    main()
