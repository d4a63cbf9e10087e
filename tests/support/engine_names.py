"""Which names of an engine our code relies on, read from that code itself."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine_plugins.engine_release import EngineRelease
from engine_plugins.engine_sources import EngineSources

__all__ = ["EngineCode", "Objects"]

ROOT = Path(__file__).parents[2]

Objects = Mapping[str, Mapping[str, str]]
"""By file, or `*` for all: an expression, and the classes that it may be of, as `module:Class`
separated by blanks."""

_OURS = ("engine_plugins", "_engine_plugins", "__")
_PYTHONS = ("_replace", "_actions")
"""Private names that are a named tuple's, or argparse's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineCode:
    """One of our two engine folders.

    Attributes:
        folder: its name.
        release: its description of the engine.
        objects: what its variables are.
    """

    folder: str
    release: EngineRelease
    objects: Objects

    def unlisted(self, *, parts: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Names that a file relies on and the parts that it needs do not list.

        Args:
            parts: by file, or `*`, whose names have to cover it.
        """
        found = []
        for file in sorted((ROOT / self.folder).glob("*.py")):
            listed = self._listed(parts.get(file.name, parts["*"]))
            for line, candidates in self._relied_on(file):
                if not any(each in listed for each in candidates):
                    found.append(f"{file.name}:{line}: {' or '.join(map('.'.join, candidates))}")
        return found

    def replaced(self) -> set[str]:
        """Functions of the engine that our code assigns its own to, as `module.path`."""
        found = set()
        for file in sorted((ROOT / self.folder).glob("*.py")):
            tree = ast.parse(file.read_text())
            for node in ast.walk(tree):
                for target in _assigned_functions(node, _functions(tree)):
                    found |= {".".join(each) for each in self._names(file, target)}
        return found

    def _listed(self, parts: tuple[str, ...]) -> set[tuple[str, str]]:
        listed = set()
        for part in parts:
            for module, path, _, _ in self.release.names[part]:
                names = path.split(".")
                listed |= {(module, ".".join(names[:at])) for at in range(len(names) + 1)}
        return listed

    def _relied_on(self, file: Path) -> Iterator[tuple[int, list[tuple[str, str]]]]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and self._is_engine(node.module):
                for alias in node.names:
                    yield node.lineno, [self._imported(str(node.module), alias.name)]
            attribute = _read(node)
            if attribute is None or attribute.attr.startswith(_OURS):
                continue
            names = self._names(file, attribute)
            if names:
                yield attribute.lineno, names
            elif _is_private_of_another(attribute):
                yield attribute.lineno, [("nothing known", ast.unparse(attribute))]

    def _names(self, file: Path, node: ast.Attribute) -> list[tuple[str, str]]:
        """What an attribute may be: of something imported, or of an object that we know."""
        owner = ast.unparse(node.value)
        known = {**self.objects.get("*", {}), **self.objects.get(file.name, {})}
        if owner in known:
            pairs = [each.split(":") for each in known[owner].split()]
            return [(module, f"{path}.{node.attr}") for module, path in pairs]
        imported = self._imports(file.read_text()).get(owner)
        if imported is None:
            return []
        module, path = imported
        return [(module, f"{path}.{node.attr}" if path else node.attr)]

    @functools.cache  # noqa: B019  one lives as long as its test's module
    def _imports(self, source: str) -> dict[str, tuple[str, str]]:
        return {
            alias.asname or alias.name: self._imported(str(node.module), alias.name)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and self._is_engine(node.module)
            for alias in node.names
        }

    def _imported(self, module: str, name: str) -> tuple[str, str]:
        """Where an imported name is; a module has no path in itself."""
        found = _sources(self.release.package).find(module, name)
        return (f"{module}.{name}", "") if isinstance(found, ast.Module) else (module, name)

    def _is_engine(self, module: str | None) -> bool:
        return str(module).partition(".")[0] == self.release.package


@functools.cache
def _sources(package: str) -> EngineSources:
    return EngineSources.installed(package)


def _read(node: ast.AST) -> ast.Attribute | None:
    """The attribute that an expression reads or sets, by its name or by `getattr`."""
    if isinstance(node, ast.Attribute):
        return node
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
        owner, name = node.args[:2]
        if isinstance(name, ast.Constant):
            return ast.copy_location(ast.Attribute(owner, str(name.value)), node)
    return None


def _functions(tree: ast.Module) -> set[str]:
    """Names of all functions and methods in a file."""
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def _assigned_functions(node: ast.AST, functions: set[str]) -> Iterator[ast.Attribute]:
    """The attributes that a statement assigns functions of this file to."""
    targets = [each for target in getattr(node, "targets", ()) for each in _parts(target)]
    for target, value in zip(targets, _parts(getattr(node, "value", node)), strict=False):
        value = value.body if isinstance(value, ast.IfExp) else value
        name = ast.unparse(value).removeprefix("self.")
        if not isinstance(target, ast.Attribute) or name not in functions:
            continue
        if ast.unparse(target.value) != "self" and not target.attr.startswith(_OURS):
            yield target


def _parts(node: ast.AST) -> list[ast.expr]:
    return list(getattr(node, "elts", [node]))


def _is_private_of_another(node: ast.Attribute) -> bool:
    owner = node.value
    is_private = node.attr.startswith("_") and node.attr not in _PYTHONS
    return is_private and not (isinstance(owner, ast.Name) and owner.id == "self")
