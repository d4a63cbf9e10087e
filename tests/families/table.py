"""The table of `make families`, as docs/families.md has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from tests.families.catalogue import cases_of
from tests.families.family import FLOAT32, WAYS, Case, Family
from tests.families.judge import EQUAL, NOT_HERE, Verdict

__all__ = ["Verdicts", "document"]

Verdicts = Mapping[str, Verdict]
"""By the name of a case."""

_TITLES = {"vllm": "vLLM", "sglang": "SGLang"}

_HEAD = """# Model families

Made by `make families` (`tests/families/`) {made}. Each row is a tiny model with random weights,
made on the spot from its config class in transformers and written as a checkpoint of the hub.

The engine loads it, one rank in a process, as its worker does. Then it is updated three times by
this product's installer (trace, coverage, plan, landing): in the second and third update, what
was proven lands in live parameters. After each update every parameter, buffer and tensor attribute
of every module is compared with a fresh load of that checkpoint by the engine, bit for bit; so is
what vLLM's packed linear layers compute, since some of their kernels hide the weights. *After
zeros*: an update of zeros comes first, which must prove no layout. *Live*: a
real server, `WeightSender.from_hf(model)`, and greedy tokens equal to those of transformers after
every update.

- **equal**: no value differs. The share is that of the last update's bytes which landed directly.
- **refused**: told at connect, before anything is touched.
- **wrong**: a value differs, or tokens do. **failed**: an update that was begun ended in an error.
- *not here*: the engine, or transformers, does not load this model on this CPU; it does not count.
"""


def document(engines: Mapping[str, Verdicts], releases: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        engines: verdicts by engine; cells without one are left open.
        releases: of the engines and of what else is named at the top.
    """
    named = ", ".join(f"{name} {release}" for name, release in releases.items())
    made = f"on {datetime.now(UTC):%Y-%m-%d} with {named}, on a CPU"
    pages = [_HEAD.format(made=made)]
    for kind, verdicts in engines.items():
        pages.append("\n".join(_page(kind, verdicts)))
    return "\n".join(pages) + "\n"


def _page(kind: str, verdicts: Verdicts) -> Iterator[str]:
    cases = cases_of(kind)
    notes: list[str] = []
    yield f"## {_TITLES[kind]}"
    yield ""
    yield _summary(cases, verdicts)
    yield ""
    yield f"| model | of the kind | {' | '.join(WAYS)} |"
    yield f"|---{'|---' * (1 + len(WAYS))}|"
    for family in (case.family for case in cases if case.way == FLOAT32):
        cells = [_cell(family, way, cases, verdicts, notes) for way in WAYS]
        yield f"| {family.name} | {family.kind} | {' | '.join(cells)} |"
    yield ""
    yield from notes


def _summary(cases: Sequence[Case], verdicts: Verdicts) -> str:
    """How many models of each result, in float32."""
    found = [verdicts[case.name] for case in cases if case.way == FLOAT32 and case.name in verdicts]
    counts: dict[str, int] = {}
    for verdict in found:
        counts[verdict.result] = counts.get(verdict.result, 0) + 1
    judged = sum(count for result, count in counts.items() if result != NOT_HERE)
    said = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    return f"{judged} models judged in float32: {said}."


def _cell(
    family: Family, way: str, cases: Sequence[Case], verdicts: Verdicts, notes: list[str]
) -> str:
    case = Case(family=family, way=way)
    if case not in cases:
        return ""
    verdict = verdicts.get(case.name)
    if verdict is None:
        return "not run"
    if verdict.result == EQUAL:
        return f"equal ({_share(verdict)})" if verdict.bytes_moved else "equal"
    notes.append(f"{len(notes) + 1}. {family.name}, {way}: {_plain(verdict.why)}")
    result = f"*{verdict.result}*" if verdict.result == NOT_HERE else f"**{verdict.result}**"
    return f"{result} [{len(notes)}]"


def _share(verdict: Verdict) -> str:
    return f"{100 * verdict.direct_bytes / verdict.bytes_moved:.0f} %"


def _plain(text: str) -> str:
    """A reason as one line of Markdown that cannot turn into markup."""
    return "`" + " ".join(text.split()).replace("`", "'")[:400] + "`"
