"""JSON schemas of plain data (msgspec structs), with the words that stand below each field."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

__all__ = ["struct_schemas"]


def struct_schemas(
    kinds: Iterable[type[msgspec.Struct]], *, ref_template: str
) -> dict[str, dict[str, Any]]:
    """The schemas of structs and of all that they are made of, by name."""
    kinds = list(kinds)
    _, schemas = msgspec.json.schema_components(kinds, ref_template=ref_template)
    for kind in _with_parts(kinds):
        schema, words = schemas[kind.__name__], _words_of(kind)
        schema["description"] = inspect.cleandoc(kind.__doc__ or "")
        for name, field in schema["properties"].items():
            if name in words:
                schema["properties"][name] = {**field, "description": words[name]}
    return schemas


def _with_parts(kinds: Iterable[type[msgspec.Struct]]) -> set[type[msgspec.Struct]]:
    found: set[type[msgspec.Struct]] = set()

    def visit(kind: msgspec.inspect.Type) -> None:
        if isinstance(kind, msgspec.inspect.StructType) and kind.cls not in found:
            found.add(kind.cls)
            for field in kind.fields:
                visit(field.type)
        for part in (getattr(kind, name, None) for name in ("item_type", "value_type", "type")):
            if isinstance(part, msgspec.inspect.Type):
                visit(part)
        for part in getattr(kind, "types", ()):
            visit(part)

    for kind in kinds:
        visit(msgspec.inspect.type_info(kind))
    return found


def _words_of(kind: type) -> dict[str, str]:
    """What is said below each field, in this class and those that it extends."""
    return {
        name: words
        for each in reversed(kind.__mro__)
        if issubclass(each, msgspec.Struct) and each is not msgspec.Struct
        for name, words in _words_in(inspect.getsource(each))
    }


def _words_in(source: str) -> Iterator[tuple[str, str]]:
    (definition,) = ast.parse(textwrap.dedent(source)).body
    lines = getattr(definition, "body", [])
    for field, below in itertools.pairwise(lines):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield field.target.id, inspect.cleandoc(str(below.value.value))
