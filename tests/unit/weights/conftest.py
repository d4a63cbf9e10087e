"""Say at the end of a run which fixture folder was read and what became of its cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.megatron_fixtures import fixture_folders, listed_cases, megatron_cases

_CASE_TEST = "test_megatron_fixtures.py::test_shards_rebuild_the_hf_tensors["


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    outcomes = dict(_outcomes(terminalreporter))
    if not outcomes:
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


def _outcomes(reporter: pytest.TerminalReporter) -> Iterator[tuple[str, str]]:
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in reporter.stats.get(outcome, []):
            _, found, case = getattr(report, "nodeid", "").partition(_CASE_TEST)
            if found:
                yield case.removesuffix("]"), outcome
