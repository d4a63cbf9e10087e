"""Say at the end of a run which fixture folder was read and what became of its cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.loader_maps import REFUSED, WHOLE_ROWS
from tests.support.megatron_fixtures import fixture_folders, listed_cases, megatron_cases

_CASE_TEST = "test_megatron_fixtures.py::test_shards_rebuild_the_hf_tensors["
_LANDING_TEST = "test_megatron_fixtures.py::test_shards_land_in_an_engines_parameters["


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    outcomes = dict(_outcomes(terminalreporter, _CASE_TEST))
    landings = dict(_outcomes(terminalreporter, _LANDING_TEST))
    if not outcomes and not landings:
        return
    terminalreporter.section("Megatron fixtures")
    for folder in fixture_folders():
        cases = [case.name for case in megatron_cases(folder)]
        done = [outcomes.get(case, "not run") for case in cases]
        counts = ", ".join(f"{done.count(outcome)} {outcome}" for outcome in sorted(set(done)))
        terminalreporter.line(f"{folder}: {len(cases)} cases found: {counts or 'none'}")
        absent = sorted(listed_cases(folder) - set(cases))
        if absent:
            terminalreporter.line(f"  listed in index.json but absent: {', '.join(absent)}")
    done = list(landings.values())
    counts = ", ".join(f"{done.count(outcome)} {outcome}" for outcome in sorted(set(done)))
    terminalreporter.line(f"landed in an engine's parameters, case by size: {counts or 'not run'}")
    for name, reason in _told(terminalreporter, REFUSED):
        terminalreporter.line(f"  {name}: {reason}")
    rows = list(_told(terminalreporter, WHOLE_ROWS))
    exact = done.count("passed") - len(rows)
    terminalreporter.line(f"bytes moved = bytes needed in {exact} of these; by whole rows:")
    for name, figures in rows:
        terminalreporter.line(f"  {name}: {figures}")


def _told(reporter: pytest.TerminalReporter, key: str) -> Iterator[tuple[str, object]]:
    """What passed landings recorded under a property, by case and size."""
    for report in reporter.stats.get("passed", []):
        name = getattr(report, "nodeid", "").partition(_LANDING_TEST)[2].removesuffix("]")
        for known, value in getattr(report, "user_properties", ()):
            if known == key:
                yield name, value


def _outcomes(reporter: pytest.TerminalReporter, test: str) -> Iterator[tuple[str, str]]:
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in reporter.stats.get(outcome, []):
            _, found, case = getattr(report, "nodeid", "").partition(test)
            if found:
                yield case.removesuffix("]"), outcome
