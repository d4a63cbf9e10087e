"""What the documents name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(
    r"`((?:kernels/engine_kernels|engine_plugins|vllm_ext|sglang_ext|tests|examples)/[\w/]+\.py)(?:::([\w.]+))?`"
)
TREE_LINE = re.compile(r"^( *)([\w/]+(?:\.py|/)) {2,}", re.MULTILINE)


@pytest.mark.parametrize(
    "document", ["README.md", "docs/architecture.md", "docs/decisions.md", "docs/releases.md"]
)
def test_every_file_and_name_exists(document: str) -> None:
    """`path::object` is a file of this checkout, and defines the object."""
    for path, name in NAMED.findall((ROOT / document).read_text()):
        source = (ROOT / path).read_text()
        last = name.rpartition(".")[2]
        assert re.search(rf"(?m)(def|class) {last}\b|^{last}\b", source), f"{path}::{name}"


def test_the_tree_has_every_module() -> None:
    """Of the packages: a module that the tree leaves out cannot be found from it."""
    text = (ROOT / "docs/architecture.md").read_text()
    tree = text.partition("## The tree")[2].partition("## ")[0]
    told = {name for _, name in TREE_LINE.findall(tree)}
    for package in ("kernels/engine_kernels", "engine_plugins", "vllm_ext", "sglang_ext"):
        for module in (ROOT / package).rglob("*.py"):
            assert module.name in told or module.name == "__init__.py", module


@pytest.mark.parametrize(
    ("package", "begins"),
    [
        ("vllm_ext", "What we wrap or replace in vLLM, in all"),
        ("sglang_ext", "What we hook in SGLang, all through"),
    ],
)
def test_the_hooks_that_are_told_are_those_that_there_are(package: str, begins: str) -> None:
    """Each of an engine's functions that we put ours in place of, and nothing else."""
    text = (ROOT / "docs/architecture.md").read_text().partition(begins)[2].partition("\n\n")[0]
    told = set(re.findall(r"`(\w+(?:\.\w+)?)`", text))
    hooked = _hooked((ROOT / package / "versions.py").read_text())
    assert hooked <= told
    assert {name for name in told if "." in name} <= hooked


def _hooked(versions: str) -> set[str]:
    return {
        entry.removeprefix("async ").partition("(")[0]
        for node in ast.walk(ast.parse(versions))
        if isinstance(node, ast.keyword) and node.arg == "hooked"
        for entries in ast.literal_eval(node.value).values()
        for entry in entries
    }
