"""What the demo shows: a table that grows step by step, and two verdicts.

A terminal gets spinners and colours; a pipe or file gets the same lines, plain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from long_request import LongRequest

__all__ = ["console", "show_check", "show_long_request", "show_step", "waiting"]

console = Console(highlight=False)

MOST_SHOWN = 38
GOOD = Text("ok ", style="bold green")
BAD = Text("FAILED ", style="bold red")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is being waited for: a spinner with a clock in a terminal, else a line."""
    if not console.is_terminal:
        console.print(f"{what} ...")
        yield
        return
    clock = Progress(
        SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console, transient=True
    )
    with clock:
        clock.add_task(what, total=None)
        yield


def show_step(step: dict[str, Any]) -> None:
    """Print a step's row of the table; above the first one, the head."""
    first = step["step"] == 1
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        show_header=first,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for head, width in (("step", 4), ("version", 7), ("kB", 5), ("update s", 6), ("pause s", 5)):
        table.add_column(head, width=width, justify="right")
    table.add_column("greedy answer: before → after", width=MOST_SHOWN, no_wrap=True)
    table.add_row(
        str(step["step"]),
        str(step["version"]),
        f"{step['bytes'] / 1e3:.1f}",
        f"{step['update_s']:.3f}",
        f"{step['pause_s']:.3f}",
        Text.assemble("  ", (step["before"], "dim"), "\n→ ", (step["after"], "bold")),
    )
    console.print(table)


def show_long_request(request: LongRequest, steps: Sequence[dict[str, Any]]) -> bool:
    """Say how the request fared that was in flight over updates; False if it was dropped."""
    if not request.complete:
        said = request.error or f"finish_reason {request.finish_reason!r}"
        console.print(
            Text.assemble(
                BAD,
                f"a request in flight was dropped after {len(request.arrivals)} of "
                f"{request.tokens} tokens: {said}",
            )
        )
        return False
    versions = [
        str(step["version"])
        for step in steps
        if request.spans(step["update_began"], step["update_began"] + step["update_s"])
    ]
    what = f"versions {', '.join(versions)} were installed" if versions else "nothing was installed"
    console.print(
        Text.assemble(
            GOOD,
            f"a long request was in flight while {what}: all of its {request.tokens} tokens "
            f"arrived and it finished normally ({request.finish_reason}); nothing was dropped",
        )
    )
    return True


def show_check(checks: Sequence[dict[str, Any]]) -> bool:
    """Say whether the server's tokens are those of transformers; False if they are not."""
    wrong = [check for check in checks if check["server"] != check["transformers"]]
    if not checks or wrong:
        console.print(
            Text.assemble(BAD, "the server's greedy tokens are not those of transformers")
        )
        for check in wrong:
            console.print(f"prompt {check['prompt']!r}", markup=False)
            console.print(f"  server       {check['server']}", markup=False)
            console.print(f"  transformers {check['transformers']}", markup=False)
        return False
    tokens = sum(len(check["server"]) for check in checks)
    console.print(
        Text.assemble(
            GOOD,
            f"the server's greedy tokens equal transformers' generate() on the trainer's weights "
            f"({len(checks)} prompts, {tokens} tokens)",
        )
    )
    return True
