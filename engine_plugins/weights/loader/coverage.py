"""Whether what the trainer offers is what the engine's loader needs, module by module."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Protocol

import torch

from engine_plugins.errors import WeightMismatchError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.dtype_fit import dtype_problems
from engine_plugins.weights.loader.loader_trace import LoaderTrace, TracedCopy
from engine_plugins.weights.loader.numbered_names import kind_of, numbers_in, renumbered

__all__ = [
    "EngineStep",
    "LoaderRules",
    "engine_steps",
    "is_kv_scale",
    "left_out",
    "left_out_by_design",
    "parameters_by_coverage",
    "prediction_layers",
]

EngineStep = tuple[list[str], list[LogicalTensor]]
"""Engine modules, and the HF tensors that fill them."""

_SHOWN = 8
_HEAD_HINT = (
    " (this engine's head is not the embedding: a model that ties the two has to be sent with both "
    "names, as state_dict() has them, or the engine started from a folder without a head)"
)
_NEVER_LOADED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_KV_SCALE = re.compile(r"\.attn\.(q|k|v|prob)_(scale|zero_point)$")
"""What an FP8 KV cache is scaled with; where no layer's is given, the engine goes by its own."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EVERY_TENSOR = (
    "publish every tensor of the model that this engine serves, in its dtype (WeightSender casts "
    "by send_dtype='engine', its default); parts that are not trained may be left out with only="
)
_WHOLE_MODULES = (
    "choose with only= all tensors of an engine's module or none: engines hold q, k and v, gate "
    "and up, and a layer's experts as one"
)
_PREDICTION_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


class LoaderRules(Protocol):
    """What only the engine knows of its loader."""

    def may_go_unused(self, name: str) -> bool:
        """Whether this model's loader is right to ignore a tensor of this name."""
        ...

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype that the engine serves in."""
        ...


def is_kv_scale(parameter: str) -> bool:
    """Whether a parameter scales an FP8 KV cache; a checkpoint need not have it."""
    return _KV_SCALE.search(parameter) is not None


def left_out_by_design(name: str, *, tied: bool, predicting: range = range(0)) -> bool:
    """Names of a checkpoint that the loaders of both engines leave out, and rightly.

    Args:
        name: the HF name.
        tied: whether the output head shares the embedding's parameter.
        predicting: layers that predict further tokens, which only a draft model has; see
            `prediction_layers`.
    """
    if _NEVER_LOADED.search(name) or (tied and _HEAD.search(name)):
        return True
    layer = _LAYER.match(name)
    return int(layer[1]) in predicting if layer else bool(predicting) and name.startswith("mtp.")


def prediction_layers(config: object) -> range:
    """Layers behind the model's own that predict further tokens (MTP), from its HF config."""
    count = next(filter(None, (getattr(config, key, None) for key in _PREDICTION_COUNTS)), 0)
    layers = int(getattr(config, "num_hidden_layers", 0))
    return range(layers, layers + int(count))


def engine_steps(
    trace: LoaderTrace,
    tensors: Sequence[LogicalTensor],
    rules: LoaderRules,
    *,
    mended: Collection[str] = (),
    partial: bool = False,
) -> tuple[list[EngineStep], list[str]]:
    """Group tensors by the engine modules that they fill, in the model's order.

    Args:
        trace: what the loader does with these tensors.
        tensors: as they are offered.
        rules: of the loader.
        mended: tensors that may come in a wrong dtype, since their sender will cast them.
        partial: whether modules of which nothing is offered stay as they are; see `left_out`.

    Returns:
        The steps, and the names that reached no parameter of this rank: another rank may need
        them, so only names that no rank needs are wrong.

    Raises:
        WeightMismatchError: a parameter is not covered, or only with made-up values, or a tensor
            would be cast.
    """
    staying = left_out(trace) if partial else frozenset()
    problems = [
        *dtype_problems(trace, rules.model_dtype, mended=mended),
        *_coverage_problems(trace, staying),
        *_padding_problems(trace, staying),
    ]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise WeightMismatchError(
            "the sources do not fit the engine's model: " + "; ".join(problems[:_SHOWN]) + more,
            remedy=_WHOLE_MODULES if partial else _EVERY_TENSOR,
        )
    reached = trace.sources()
    unused = [
        tensor.name
        for tensor in tensors
        if tensor.name not in reached and not rules.may_go_unused(tensor.name)
    ]
    steps = _grouped(trace, {tensor.name: tensor for tensor in tensors})
    return _as_one(steps) if trace.whole else steps, unused


def left_out(trace: LoaderTrace) -> frozenset[str]:
    """Parameters of the modules of which no tensor reached any: what an update leaves as it is."""
    filling = trace.filling()
    modules: dict[str, list[str]] = {}
    for name, numel in trace.parameter_numel.items():
        if numel and not is_kv_scale(name):
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    return frozenset(
        name
        for names in modules.values()
        if not any(filling[each].copied for each in names)
        for name in names
    )


def parameters_by_coverage(trace: LoaderTrace) -> tuple[int, list[str]]:
    """How many parameters a checkpoint fills, and which have nothing to load by design.

    A third kind, those that are left out, is counted apart.
    """
    idle = [name for name, numel in trace.parameter_numel.items() if not numel]
    return len(trace.parameter_numel) - len(idle) - len(left_out(trace)), idle


def _coverage_problems(trace: LoaderTrace, staying: frozenset[str]) -> list[str]:
    problems: list[str] = []
    givers = _givers(trace.copies)
    fullest = _fullest(givers)
    for parameter, (filled, copied) in trace.filling().items():
        wanted = trace.parameter_numel[parameter]
        if filled == copied == wanted or parameter in staying:
            continue
        missing = _missing_names(parameter, givers, fullest)
        if missing:
            problems.append(f"{', '.join(missing)} missing (needed by {parameter})")
        elif filled or not is_kv_scale(parameter):
            problems.append(
                _partly_filled(parameter, wanted, filled, copied, [*givers.get(parameter, ())])
            )
    return problems


def _partly_filled(
    parameter: str, wanted: int, filled: int, copied: int, givers: Sequence[str]
) -> str:
    if not givers:
        hint = _HEAD_HINT if parameter.endswith("lm_head.weight") else ""
        return f"{parameter} has {wanted} elements, and no tensor fills it{hint}"
    verb = "fill" if len(givers) > 1 else "fills"
    twice = f", {copied - filled} of them by two copies" if copied > filled else ""
    return f"{parameter} has {wanted} elements, {', '.join(givers)} {verb} {filled}{twice}"


def _padding_problems(trace: LoaderTrace, staying: frozenset[str]) -> list[str]:
    """A tensor that is too short and was filled up with a constant.

    SGLang does so on the CPU, where it also pads heads that its ranks cannot share evenly. What an
    engine pads by design it pads alike in every layer.
    """
    givers = _givers(trace.copies)
    padded = _constant_numel(trace.copies)
    alike: dict[str, list[str]] = {}
    for parameter in trace.parameter_numel:
        if parameter not in staying:
            alike.setdefault(kind_of(parameter), []).append(parameter)
    problems: list[str] = []
    for parameters in alike.values():
        least = min(padded.get(parameter, 0) for parameter in parameters)
        problems += [
            f"{parameter} is filled but for {padded[parameter]} elements, which the loader makes "
            f"up, by {', '.join(givers[parameter]) or 'no tensor'}"
            for parameter in parameters
            if padded.get(parameter, 0) > least
        ]
    return problems


def _constant_numel(copies: Sequence[TracedCopy]) -> dict[str, int]:
    """Elements of each parameter that the loader fills with a constant."""
    numel: dict[str, int] = {}
    for copy in copies:
        if not copy.sources:
            numel[copy.parameter] = numel.get(copy.parameter, 0) + prod(copy.shape)
    return numel


def _givers(copies: Sequence[TracedCopy]) -> dict[str, dict[str, None]]:
    givers: dict[str, dict[str, None]] = {}
    for copy in copies:
        givers.setdefault(copy.parameter, {}).update(dict.fromkeys(copy.sources))
    return givers


def _missing_names(
    parameter: str, givers: Mapping[str, Mapping[str, None]], fullest: Mapping[str, str]
) -> list[str]:
    """Names that the same parameter of another layer was given, and this one was not."""
    own, numbers = givers.get(parameter, {}), numbers_in(parameter)
    other = fullest.get(kind_of(parameter), parameter)
    there = numbers_in(other)
    here = [renumbered(name, there, numbers) for name in givers.get(other, ())]
    return [name for name in here if name not in own][:_SHOWN] if numbers else []


def _fullest(givers: Mapping[str, Mapping[str, None]]) -> dict[str, str]:
    """Of parameters that differ by their numbers alone, the first that most tensors fill."""
    found: dict[str, str] = {}
    for parameter, names in givers.items():
        kind = kind_of(parameter)
        if kind not in found or len(names) > len(givers[found[kind]]):
            found[kind] = parameter
    return found


def _grouped(trace: LoaderTrace, tensors: dict[str, LogicalTensor]) -> list[EngineStep]:
    """Modules that share a tensor share a step; nothing is fetched twice."""
    modules = trace.modules()
    step_of: dict[str, EngineStep] = {}
    steps: list[EngineStep] = []
    for module in _model_order(trace, modules):
        names = modules[module]
        shared = {id(step_of[name]): step_of[name] for name in names if name in step_of}
        first, *others = shared.values() or [([], [])]
        if not shared:
            steps.append(first)
        for other in others:
            first[0].extend(other[0])
            first[1].extend(other[1])
            step_of.update((tensor.name, first) for tensor in other[1])
        if others:
            gone = set(map(id, others))
            steps = [step for step in steps if id(step) not in gone]
        first[0].append(module)
        for name in names:
            if name not in step_of:
                step_of[name] = first
                first[1].append(tensors[name])
    return steps


def _as_one(steps: Sequence[EngineStep]) -> list[EngineStep]:
    """All steps together, for a loader that wants everything in one call."""
    modules = [module for step in steps for module in step[0]]
    return [(modules, [tensor for step in steps for tensor in step[1]])] if steps else []


def _model_order(trace: LoaderTrace, modules: dict[str, list[str]]) -> list[str]:
    in_model = dict.fromkeys(parameter.rpartition(".")[0] for parameter in trace.parameter_numel)
    in_model |= dict.fromkeys(modules)  # those that only derive something come last
    return [module for module in in_model if modules.get(module)]
