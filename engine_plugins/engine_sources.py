"""What an engine's sources define, found without importing them.

So an installed engine can be looked at before any of its modules is loaded, and a wheel that is
installed nowhere.
"""

from __future__ import annotations

import ast
import functools
import zipfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Self

__all__ = ["EngineSources"]


class _Found(NamedTuple):
    """Where a name is defined: a statement, or a whole module."""

    module: str
    node: ast.AST


class EngineSources:
    """The sources of one package.

    Args:
        root: the folder that holds the package, or the root of a wheel that does.
        package: its name.
    """

    def __init__(self, root: Path | zipfile.Path, package: str) -> None:
        self._root, self._package = root, package
        # Kept no longer than this object: the trees take more memory than the texts.
        self._tree = functools.cache(self._parse)
        self._names = functools.cache(_names)

    @classmethod
    def installed(cls, package: str) -> Self:
        """Those of this environment.

        Raises:
            ModuleNotFoundError: there is no such package.
        """
        spec = find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"no package {package}")
        return cls(Path(next(iter(spec.submodule_search_locations))).parent, package)

    def find(self, module: str, path: str) -> ast.AST | None:
        """The statement that defines `path` in a module; `None` if nothing does.

        Of a class a name is defined by its body, by an assignment to `self.name` in one of its
        methods, or by a class above it.
        """
        first, *names = path.split(".")
        found = self._in_module(module, first)
        for name in names:
            found = None if found is None else self._within(found, name)
        return None if found is None else found.node

    def _within(self, found: _Found, name: str) -> _Found | None:
        if isinstance(found.node, ast.Module):
            return self._in_module(found.module, name)
        return self._in_class(found, name) if isinstance(found.node, ast.ClassDef) else None

    def _in_module(self, module: str, name: str) -> _Found | None:
        tree = self._tree(module) or ast.Module([], [])  # a folder may have no source of its own
        statement = self._names(tree).get(name)
        if isinstance(statement, ast.ImportFrom):
            (original,) = [each.name for each in statement.names if _bound(each) == name]
            return self._imported(module, statement, original)
        if statement is not None:
            return _Found(module, statement)
        submodule = self._tree(f"{module}.{name}")
        if submodule is not None:
            return _Found(f"{module}.{name}", submodule)
        return self._from_stars(module, tree, name)

    def _from_stars(self, module: str, tree: ast.Module, name: str) -> _Found | None:
        for each in tree.body:
            if isinstance(each, ast.ImportFrom) and each.names[0].name == "*":
                found = self._imported(module, each, name)
                if found is not None and found.node is not each:
                    return found
        return None

    def _imported(self, module: str, statement: ast.ImportFrom, name: str) -> _Found | None:
        source = statement.module or ""
        if statement.level:
            parents = module.split(".")[: None if self._is_package(module) else -1]
            parents = parents[: len(parents) - statement.level + 1]
            source = ".".join([*parents, *([source] if source else [])])
        if source.partition(".")[0] != self._package:
            return _Found(module, statement)  # somebody else's: it is there
        return self._in_module(source, name)

    def _in_class(self, found: _Found, name: str) -> _Found | None:
        node = found.node
        if not isinstance(node, ast.ClassDef):
            return None
        member = self._names(node).get(name)
        if member is not None:
            return _Found(found.module, member)
        for base in node.bases:
            above = self._base(found.module, base)
            inherited = None if above is None else self._in_class(above, name)
            if inherited is not None:
                return inherited
        return None

    def _base(self, module: str, base: ast.expr) -> _Found | None:
        if isinstance(base, ast.Subscript):
            return self._base(module, base.value)
        if isinstance(base, ast.Attribute):
            owner = self._base(module, base.value)
            return None if owner is None else self._within(owner, base.attr)
        return self._in_module(module, base.id) if isinstance(base, ast.Name) else None

    def _parse(self, module: str) -> ast.Module | None:
        *folders, name = module.split(".")
        own = [name, "__init__.py"] if self._is_package(module) else [name + ".py"]
        file = self._root.joinpath(*folders, *own)
        return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _is_package(self, module: str) -> bool:
        return self._root.joinpath(*module.split("."), "__init__.py").is_file()


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name


def _names(owner: ast.Module | ast.ClassDef) -> dict[str, ast.AST]:
    """What a module or a class defines: the last statement of its body that does, by name.

    Of a class also what its methods assign to `self`.
    """
    names: dict[str, ast.AST] = {}
    for each in ast.walk(owner) if isinstance(owner, ast.ClassDef) else ():
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
            owned = isinstance(each.value, ast.Name) and each.value.id == "self"
            names |= {each.attr: each} if owned else {}
    for statement in _statements(owner.body):
        names |= dict.fromkeys(_defined(statement), statement)
    return names


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body, and of the branches in it, which may be the ones that are taken."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            for branch in ("body", "handlers", "orelse", "finalbody"):
                yield from _statements(getattr(statement, branch, []))


def _defined(statement: ast.stmt) -> set[str]:
    """Names that a statement defines, where it stands."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {_bound(each).partition(".")[0] for each in statement.names}
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return {
        each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)
    }
