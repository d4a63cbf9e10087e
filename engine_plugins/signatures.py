"""Signatures as Python writes them, and whether those of an engine fit how we use them."""

from __future__ import annotations

import ast
from inspect import Parameter, Signature

__all__ = ["fits_call", "fits_hook", "signature_of", "signature_written"]

Function = ast.FunctionDef | ast.AsyncFunctionDef

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def signature_written(text: str) -> Signature:
    """The signature that a text as `(self, request, *, mode=None)` describes."""
    (function,) = ast.parse(f"def name{text}: ...").body
    if not isinstance(function, Function):  # pragma: no cover
        raise SyntaxError(f"{text!r} is not a signature")
    return signature_of(function)


def signature_of(function: Function) -> Signature:
    """The names, kinds and defaults of a function's parameters; a default is shown as `...`."""
    taken = function.args
    positional = [
        *((each, Parameter.POSITIONAL_ONLY) for each in taken.posonlyargs),
        *((each, Parameter.POSITIONAL_OR_KEYWORD) for each in taken.args),
    ]
    required = len(positional) - len(taken.defaults)
    parameters = [
        _parameter(each, kind, at >= required) for at, (each, kind) in enumerate(positional)
    ]
    if taken.vararg is not None:
        parameters.append(Parameter(taken.vararg.arg, Parameter.VAR_POSITIONAL))
    for each, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True):
        parameters.append(_parameter(each, Parameter.KEYWORD_ONLY, default is not None))
    if taken.kwarg is not None:
        parameters.append(Parameter(taken.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


def fits_call(seen: Signature, wanted: Signature) -> bool:
    """Whether a function can be called as `wanted` says, each parameter by what it was then.

    Args:
        seen: of the engine's function.
        wanted: what we pass: names in their places, then those passed by keyword. `*args` and
            `**kwargs` stand for any number.
    """
    by_place = [each.name for each in _of(seen, *_POSITIONAL)]
    by_name = {each.name for each in _of(seen, *_BY_NAME)}
    takes = {each.kind for each in seen.parameters.values()}
    places = [each.name for each in _of(wanted, *_POSITIONAL)]
    names = {each.name for each in _of(wanted, Parameter.KEYWORD_ONLY)}
    known = places[: len(by_place)] == by_place[: len(places)]
    needs = {each.kind for each in _of(wanted, Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}
    if len(places) > len(by_place):
        needs.add(Parameter.VAR_POSITIONAL)
    if not names <= by_name:
        needs.add(Parameter.VAR_KEYWORD)
    given = {*places, *names}
    left = [each for each in _of(seen, *_POSITIONAL, Parameter.KEYWORD_ONLY) if _is_needed(each)]
    return known and needs <= takes and all(each.name in given for each in left)


def fits_hook(seen: Signature, wanted: Signature) -> bool:
    """Whether a function that takes what `wanted` says can stand in a function's place.

    Args:
        seen: of the engine's function, which the engine goes on to call as its own.
        wanted: of ours. `*args` and `**kwargs` stand for what is handed on unseen, and without
            them nothing may be added.
    """
    places = [each.name for each in _of(wanted, *_POSITIONAL)]
    names = [each.name for each in _of(wanted, Parameter.KEYWORD_ONLY)]
    if [each.name for each in _of(seen, *_POSITIONAL)][: len(places)] != places:
        return False
    if not {*names} <= {each.name for each in _of(seen, *_BY_NAME)}:
        return False
    ours = {name: wanted.parameters[name] for name in (*places, *names)}
    if any(_is_needed(each) > _is_needed(seen.parameters[name]) for name, each in ours.items()):
        return False
    handed_on = {each.kind for each in wanted.parameters.values()}
    added = [each for name, each in seen.parameters.items() if name not in ours]
    return all(_ways(each) & handed_on for each in added)


def _ways(parameter: Parameter) -> set[object]:
    """By which of `*args` and `**kwargs` a parameter may come that is not named."""
    ways: set[object] = set()
    if parameter.kind in (*_POSITIONAL, Parameter.VAR_POSITIONAL):
        ways.add(Parameter.VAR_POSITIONAL)
    if parameter.kind in (*_BY_NAME, Parameter.VAR_KEYWORD):
        ways.add(Parameter.VAR_KEYWORD)
    return ways


def _parameter(argument: ast.arg, kind: object, has_default: bool) -> Parameter:
    default = ... if has_default else Parameter.empty
    return Parameter(argument.arg, kind, default=default)  # type: ignore[arg-type]


def _of(signature: Signature, *kinds: object) -> list[Parameter]:
    return [each for each in signature.parameters.values() if each.kind in kinds]


def _is_needed(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty
