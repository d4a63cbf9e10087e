"""The table of the results, kept as lines of JSON so that parts add up to one table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tests.liveness.result import Result
from tests.liveness.rows import Row
from tests.liveness.storms import StormResult

__all__ = ["keep", "kept", "line", "storm_line", "storm_table", "summary", "table"]

_COLUMNS = (
    *("engine", "TP", "APIs", "state made", "at", "timeout_s", "told s", "culprit"),
    *("/state", "true s", "no request held s", "ended", "repaired s", "left", "holds"),
)


def keep(file: Path, result: Result) -> None:
    """Add a result to a file of them; the last of a row counts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(result)) + "\n")


def kept(file: Path) -> dict[Row, Result]:
    """All results of a file."""
    found: dict[Row, Result] = {}
    for each in file.read_text().splitlines() if file.exists() else ():
        told = json.loads(each)
        row = Row(**told.pop("row"))
        found[row] = Result(**told, row=row)
    return found


def line(result: Result) -> str:
    """One row of the table."""
    row = result.row
    ended = result.gone_s is not None
    cells = [
        *(row.engine, row.tensor_parallel, row.api_servers, row.fault.replace("_", " ")),
        *(row.phase, f"{row.timeout_s:g}"),
        f"{_s(result.told_s)} (done)" if result.told == "done" else _s(result.told_s),
        {None: "-", True: "named", False: "not named"}[result.named],
        "-" if ended else result.state,
        "-" if ended else _s(result.true_s),
        "-" if ended else _s(result.door_s),
        f"{_s(result.gone_s)} s, status {result.ended}" if ended else "-",
        "restart" if result.for_good else _s(result.repaired_s),
        ", ".join([*result.left, *result.unfinished]) or "nothing",
        "yes" if result.holds else "**" + "; ".join(result.violations()) + "**",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(results: Iterable[Result]) -> str:
    """All of them in Markdown."""
    head = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join([*head, *map(line, results)])


def storm_table(results: Iterable[StormResult]) -> str:
    """What became of updates beside others' calls, in Markdown."""
    columns = (
        *("engine", "APIs", "beside", "updates", "failed", "longest s"),
        *("others' calls by status", "serves after", "holds"),
    )
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *map(storm_line, results)])


def storm_line(result: StormResult) -> str:
    """One of them."""
    storm = result.storm
    failed = "; ".join(f"{count} x {what}" for what, count in result.failed.most_common(3))
    cells = [
        *(storm.engine, storm.api_servers, storm.calls, result.updates),
        f"**{failed}**" if failed else 0,
        _s(result.longest_s),
        ", ".join(f"{count} x {status}" for status, count in sorted(result.calls.items())) or "-",
        "yes" if result.serves else "**no**",
        "yes" if result.holds else f"**no** ({result.wrong} wrong, {result.lying} lying)",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def summary(results: Iterable[Result]) -> str:
    """The sums."""
    found = list(results)
    told = {
        "rows": len(found),
        "not reached": sum(not each.reached for each in found),
        "do not hold": sum(not each.holds for each in found),
        "answers": sum(each.answers for each in found),
        "wrong": sum(each.wrong for each in found),
        "under a lying version": sum(each.lying for each in found),
    }
    return ", ".join(f"{count} {what}" for what, count in told.items())


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"
