"""The table of the results, kept as lines of JSON so that parts add up to one table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.chaos_update.cases import Case
from tests.chaos_update.episode import Result

__all__ = ["keep", "kept", "line", "summary", "table"]

_COLUMNS = (
    *("#", "engine", "TP", "APIs", "wire", "dtype", "mode", "phases", "at", "fault"),
    *("tries", "answers", "wrong", "lying", "end", "s"),
)


def keep(file: Path, number: int, result: Result) -> None:
    """Add a result to a file of them; the last of a case counts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps({"number": number, **asdict(result)}) + "\n")


def kept(file: Path) -> dict[int, Result]:
    """All results of a file by the number of their case."""
    found: dict[int, Result] = {}
    for each in file.read_text().splitlines() if file.exists() else ():
        told = json.loads(each)
        number = told.pop("number")
        found[number] = Result(**{**told, "case": Case(**told["case"])})
    return dict(sorted(found.items()))


def line(number: int, result: Result) -> str:
    """One row of the table."""
    case = result.case
    cells = [
        *(number, case.engine, case.tensor_parallel, case.api_servers, case.wire, case.dtype),
        *(case.mode, case.commit, case.phase, case.fault.replace("_", " ")),
        result.tries if result.reached else "not reached",
        *(result.answers, result.wrong, result.lying),
        result.end if result.holds else f"**{result.end}**",
        round(result.took_s),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(results: dict[int, Result]) -> str:
    """All of them in Markdown."""
    head = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join([*head, *(line(number, result) for number, result in results.items())])


def summary(results: Sequence[Result]) -> str:
    """The sums."""
    ends = Counter(result.end for result in results if result.reached)
    unreached = sum(not result.reached for result in results)
    bad = sum(not result.holds for result in results)
    return (
        f"{len(results)} cases, {unreached} not reached; {sum(r.answers for r in results)} answers,"
        f" {sum(r.wrong for r in results)} wrong, {sum(r.lying for r in results)} under a lying "
        f"version; {', '.join(f'{count} {end}' for end, count in sorted(ends.items()))}; "
        f"{bad} cases do not hold; {sum(r.took_s for r in results):.0f} s without servers' starts"
    )
