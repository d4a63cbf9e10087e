"""One model of one engine, in a process of its own: three updates, each held against a fresh load.

The trainer is a transformers model, offered as `from_hf(model)` offers it.

`python -m tests.families.judge ENGINE FAMILY WAY FILE` writes what it found as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine_plugins.errors import EnginePluginError
from engine_plugins.weights.receiving.receiver import WeightReceiver
from engine_plugins.weights.sources.hf_offer import HfOffer
from tests.families.catalogue import family_named
from tests.families.engines import LOADED_RANKS, LoadedSglang, LoadedVllm
from tests.families.family import AFTER_ZEROS, Case
from tests.families.maker import become, random_model, save
from tests.families.tensors import differences, tensors_of
from tests.support.loader_maps import PlayedEngine, played_engine, receiving
from tests.support.source_ranks import SourceRank, offered_boxes

__all__ = ["EQUAL", "FAILED", "NOT_HERE", "REFUSED", "WRONG", "Verdict", "judge"]

EQUAL, REFUSED, WRONG, FAILED = "equal", "refused", "wrong", "failed"
NOT_HERE = "not here"
"""The engine itself does not load the checkpoint on this machine: nothing was judged."""

VERSIONS = (1, 2, 0)
"""Weights of the three updates; the engine was started with 0."""

Tensors = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class Verdict:
    """What became of one model.

    Attributes:
        result: `EQUAL`, `REFUSED`, `WRONG`, `FAILED` or `NOT_HERE`.
        why: the refusal or the error in its own words, or the tensors that differ.
        tensors: how many were compared after each update.
        bytes_moved: of the last update.
        direct_bytes: of these, bytes that landed in live parameters.
        undetermined: tensors in which two fresh loads differ: no checkpoint fills them.
        trace: of an unexpected error.
    """

    result: str
    why: str = ""
    tensors: int = 0
    bytes_moved: int = 0
    direct_bytes: int = 0
    undetermined: list[str] = field(default_factory=list)
    trace: str = ""


class _Ended(Exception):
    """A verdict before the last update."""

    def __init__(self, result: str, why: str) -> None:
        super().__init__(result, why)
        self.result, self.why = result, why


def judge(engine: PlayedEngine, case: Case, folder: Path) -> Verdict:
    """Update one model three times, and compare it each time with a fresh load."""
    verdict = Verdict(result=EQUAL)
    try:
        trained, states = _models(case)
        folders = [_saved(trained, state, case, folder / f"v{n}") for n, state in enumerate(states)]
        fresh = _fresh_loads(engine, case, folders)
    except Exception as error:
        return Verdict(result=NOT_HERE, why=_words(error), trace=traceback.format_exc())
    undetermined = differences(fresh.pop(), fresh[0])
    verdict.undetermined = undetermined
    wanted = [{k: v for k, v in each.items() if k not in undetermined} for each in fresh]
    verdict.tensors = len(wanted[0])
    try:
        _update_thrice(engine, case, folders[0], trained, states, wanted, verdict)
    except _Ended as ended:
        verdict.result, verdict.why = ended.result, ended.why
        verdict.trace = traceback.format_exc()
    return verdict


def _models(case: Case) -> tuple[Any, list[Tensors]]:
    """A model, and the values of each version that it will hold.

    All before an engine is loaded: vLLM's backend of transformers' code changes its classes.
    """
    dtype = getattr(torch, case.dtype)
    models = [random_model(case.family, seed=seed, dtype=dtype) for seed in range(len(VERSIONS))]
    states = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    return models[0], states


def _saved(model: Any, state: Tensors, case: Case, folder: Path) -> Path:
    become(model, state)
    return save(model, case.family, folder)


@contextmanager
def _loaded(engine: PlayedEngine, case: Case, folder: Path) -> Iterator[LoadedVllm | LoadedSglang]:
    arguments = case.family.arguments.get(engine.kind, {})
    with engine.rank(folder, tp_size=1, tp_rank=0, dtype=case.dtype, **arguments) as rank:
        yield LOADED_RANKS[engine.kind](rank)


def _all_of(loaded: LoadedVllm | LoadedSglang) -> Tensors:
    return {**tensors_of(loaded.model), **loaded.computed()}


def _fresh_loads(engine: PlayedEngine, case: Case, folders: Sequence[Path]) -> list[Tensors]:
    """What the engine holds after a load of each checkpoint; of the first one, again at the end."""
    found = []
    for folder in (*folders, folders[0]):
        with _loaded(engine, case, folder) as loaded:
            found.append(_all_of(loaded))
    return found


def _update_thrice(
    engine: PlayedEngine,
    case: Case,
    folder: Path,
    trained: Any,
    states: Sequence[Tensors],
    wanted: Sequence[Tensors],
    verdict: Verdict,
) -> None:
    with (
        _loaded(engine, case, folder) as loaded,
        offered_boxes(HfOffer(trained).boxes()) as trainers,
        receiving(loaded.installer()) as receiver,
    ):
        if case.way == AFTER_ZEROS:
            for tensor in trained.state_dict().values():
                tensor.zero_()
            _connect(receiver, trainers)
            _install(receiver, verdict, 0)
        for number, version in enumerate(VERSIONS, 1):
            become(trained, states[version])
            _connect(receiver, trainers)
            _install(receiver, verdict, number)
            wrong = differences(_all_of(loaded), wanted[version])
            if wrong:
                shown = ", ".join(wrong[:4])
                raise _Ended(WRONG, f"update {number}: {len(wrong)} tensors differ: {shown}")


def _connect(receiver: WeightReceiver, trainers: Sequence[SourceRank]) -> None:
    """Make the plan, and refuse as the service does."""
    for trainer in trainers:
        trainer.source.refresh()
    try:
        unused = receiver.connect("plan", [trainer.manifest for trainer in trainers]).unused
    except EnginePluginError as error:
        raise _Ended(REFUSED, f"{error} [{error.remedy}]") from error
    except Exception as error:
        raise _Ended(FAILED, f"connect: {_words(error)}") from error
    if unused:
        shown = ", ".join(sorted(unused)[:4])
        raise _Ended(REFUSED, f"{len(unused)} tensors reach no parameter: {shown}")


def _install(receiver: WeightReceiver, verdict: Verdict, number: int) -> None:
    try:
        status = receiver.start("plan", staged=False, timeout_s=60.0)
        while status.steps_installed < status.steps_total:
            status = receiver.advance(budget_s=1.0)
        report = receiver.finish()
        receiver.drop("plan")
    except Exception as error:
        raise _Ended(FAILED, f"update {number}: {_words(error)}") from error
    verdict.bytes_moved, verdict.direct_bytes = report.bytes_moved, report.direct_bytes


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def main() -> None:
    """Judge one model, and write the verdict."""
    kind, name, way, file = sys.argv[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, played_engine() as engine:
        assert engine.kind == kind
        verdict = judge(engine, Case(family=family_named(name), way=way), Path(folder))
    Path(file).write_text(json.dumps(asdict(verdict)))


if __name__ == "__main__":
    main()
