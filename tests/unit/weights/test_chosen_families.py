"""A few models of `make families` that an update once got wrong, by its own judge."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.families.catalogue import FAMILIES
from tests.families.family import BF16, Case
from tests.families.judge import EQUAL, judge
from tests.support.loader_maps import played_engine

pytestmark = pytest.mark.loader

CHOSEN = {"vllm": "falcon-h1", "sglang": "mixtral"}
"""Mamba's view of a weight that bfloat16 packs; names that transformers renames in memory."""
KIND = next(kind for kind in CHOSEN if find_spec(kind) is not None)


def test_three_updates_leave_what_a_fresh_load_gives(tmp_path: Path) -> None:
    (family,) = [each for each in FAMILIES if each.name == CHOSEN[KIND]]
    with played_engine() as engine:
        verdict = judge(engine, Case(family=family, way=BF16), tmp_path)
    assert verdict.result == EQUAL, verdict.why
