"""The core behaves the same in every engine: no line of it asks which one it is in.

Import contracts keep engines from being imported; this keeps their names out of the code as well.
Docstrings may speak of engines.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine_plugins

CORE = Path(engine_plugins.__file__).parent
MODULES = sorted(CORE.rglob("*.py"))
ENGINES = ("vllm", "sglang")


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name and every string of a module that is not a docstring, with its line."""
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield line, node.value
            continue
        for field in ("id", "attr", "name", "module", "arg"):
            if isinstance(word := getattr(node, field, None), str):
                yield line, word


def engines_named(source: str) -> list[str]:
    """Where a module's code names an engine."""
    found = words(ast.parse(source))
    return [f"{line}: {word}" for line, word in found if any(e in word.lower() for e in ENGINES)]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(CORE)))
def test_no_module_of_the_core_names_an_engine(module: Path) -> None:
    """Neither to import it, nor to compare with it, nor in a message."""
    assert engines_named(module.read_text()) == []


def test_a_name_is_found_wherever_it_stands() -> None:
    """In an import, a comparison, an attribute, a keyword and a message; not in a docstring."""
    for code in (
        "import vllm",
        "from sglang.srt import x",
        "kind == 'vllm'",
        "control.sglang",
        "f(is_vllm=True)",
        "raise E(f'vLLM {x} failed')",
    ):
        assert engines_named(code), code
    assert engines_named('"""As in vLLM."""\nx = 1') == []
