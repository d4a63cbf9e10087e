"""Marks what no engine has a part in, which is run in one environment only; parts tests' losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_plugins.weights.transport import quarantine

HERE = Path(__file__).parent
OF_AN_ENGINE = ("vllm_ext", "sglang_ext")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m core` nothing that imports an engine is read: it takes longer than many tests."""
    ours = collection_path.is_relative_to(HERE) and collection_path != HERE
    of_an_engine = ours and collection_path.relative_to(HERE).parts[0] in OF_AN_ENGINE
    return True if of_an_engine and config.option.markexpr == "core" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(HERE) or item.get_closest_marker("loader") is not None:
            continue
        if item.path.relative_to(HERE).parts[0] not in OF_AN_ENGINE:
            item.add_marker("core")


_lost_by_others: list[object] = []


@pytest.fixture(autouse=True)
def nothing_is_lost_yet() -> None:
    """What other tests of this process have lost is not counted, and not freed either."""
    if quarantine._kept:
        _lost_by_others.append(quarantine._kept)
        quarantine._kept = []
