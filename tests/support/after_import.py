"""Functions run in fresh processes that have imported torch and no more.

It is imported once, in a program of which every case is a fork.
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
from typing import Any

__all__ = ["Environ", "run_after_import"]

Environ = Mapping[str, str | None]
"""What is put into the environment, and with `None` what is taken out of it."""


def run_after_import(
    function: Callable[..., Any], cases: Sequence[tuple[Environ, Sequence[Any]]]
) -> list[tuple[Any, str]]:
    """What a function of a test module gives for each (environment, arguments), and its stderr.

    The environment is added to this one's; arguments and answers must be JSON.
    """
    request = {"module": function.__module__, "function": function.__name__, "cases": cases}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.after_import"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(answer, said) for answer, said in json.loads(done.stdout)]


def main() -> None:
    request = json.load(sys.stdin)
    importlib.import_module("torch")
    function = getattr(importlib.import_module(request["module"]), request["function"])
    forks = multiprocessing.get_context("fork")
    answers = []
    for environ, arguments in request["cases"]:
        there, here = forks.Pipe()
        child = forks.Process(target=_answer, args=(here, function, environ, arguments))
        child.start()
        here.close()
        answers.append(there.recv())
        child.join()
    json.dump(answers, sys.stdout)


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
