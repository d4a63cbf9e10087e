"""A part of `make families`: updates leave SGLang's models as a fresh load would, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.catalogue import family_named
from tests.families.family import Case
from tests.families.judge import EQUAL
from tests.families.runner import judged


@pytest.mark.parametrize(
    ("family", "way", "lands"),
    [("gemma2", "float32", True), ("gemma4", "float32", True), ("qwen3-moe", "bfloat16", True)],
)
def test_updates_equal_a_fresh_load(family: str, way: str, lands: bool, tmp_path: Path) -> None:
    verdict = judged("sglang", Case(family=family_named(family), way=way), tmp_path)
    assert verdict.result == EQUAL, verdict
    assert verdict.tensors > 30
    assert verdict.direct_bytes > 0 or not lands, "no module took the riskier way"
