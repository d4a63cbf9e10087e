"""Marks what no engine has a part in: such tests are run in one environment only."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
OF_AN_ENGINE = ("vllm_ext", "sglang_ext")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(HERE) or item.get_closest_marker("loader") is not None:
            continue
        if item.path.relative_to(HERE).parts[0] not in OF_AN_ENGINE:
            item.add_marker("core")
