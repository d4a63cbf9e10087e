"""A part of `make families`: updates leave vLLM's models as a fresh load would, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.catalogue import family_named
from tests.families.family import Case
from tests.families.judge import EQUAL
from tests.families.runner import judged


@pytest.mark.parametrize(
    ("family", "way", "lands"),
    [
        ("gpt-oss", "float32", False),
        ("qwen3-moe", "after zeros", True),
        ("qwen2", "bfloat16", True),
    ],
)
def test_updates_equal_a_fresh_load(family: str, way: str, lands: bool, tmp_path: Path) -> None:
    verdict = judged("vllm", Case(family=family_named(family), way=way), tmp_path)
    assert verdict.result == EQUAL, verdict
    assert verdict.tensors > 30
    assert verdict.direct_bytes > 0 or not lands, "no module took the riskier way"
