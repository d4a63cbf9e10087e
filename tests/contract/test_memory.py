"""An update in place stays within its memory, on a model that is larger than the bound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from engine_plugins import WeightSender
from engine_plugins.sender.report import SenderReport
from engine_plugins.weights.contract.report import UpdateReport
from engine_plugins.weights.receiving.connection import Direction
from engine_plugins.weights.receiving.staging import Mode
from tests.support.configurations import SIZED, on
from tests.support.engine_server import TOKEN
from tests.support.hf_reference import greedy
from tests.support.served import Served
from tests.support.sized_models import sized_qwen3

PROMPT = [5, 6, 7, 8, 9]


@on(SIZED)
def test_peak_and_buffers_stay_within_their_bounds(served: Served) -> None:
    """Peak over base within the engine's number of modules + 32 MiB; buffers below two.

    Where everything lands in live parameters there is no buffer, and the peak is within 1 % of the
    weights. Elsewhere what the engine does not pack lands all the same: norms, embedding, head.
    """
    with _training(served, "pull") as (model, sender):
        whole = sum(parameter.nbytes for parameter in model.parameters())
        for version in (1, 2, 3):
            report = _step(served, model, sender, version, mode="in_place")
            (plan,), (update,) = report.plans.values(), report.engines.values()
            _says_which_way_bytes_went(report, update)
            largest = plan.ranks[0].largest_step_bytes
            bound = served.engine.peak_modules * largest + (32 << 20)
            assert plan.ranks[0].arena_bytes < 2 * largest
            if served.lands_directly and version > 1:
                _landed_without_a_copy(update, whole)
            else:
                assert whole > bound, "the model is too small to show anything"
                # What the process gave back meanwhile hides some of the buffer.
                assert largest / 2 < update.peak_extra_bytes < bound, f"update {version}"
                unpacked = _unpacked_bytes(model) if version > 1 else 0
                assert update.direct_bytes == unpacked
                assert update.loader_bytes == whole - unpacked


@on(SIZED)
def test_a_push_into_live_parameters_needs_no_memory_either(served: Served) -> None:
    """Where the engine's parameters can be written to; elsewhere it has a buffer for all."""
    with _training(served, "push") as (model, sender):
        whole = sum(parameter.nbytes for parameter in model.parameters())
        reports = [_step(served, model, sender, version) for version in (4, 5, 6)]
        (update,) = reports[-1].engines.values()
        if served.lands_directly:
            _landed_without_a_copy(update, whole)
        else:
            assert update.peak_extra_bytes > update.loader_bytes > 0


@contextmanager
def _training(
    served: Served, direction: Direction
) -> Iterator[tuple[PreTrainedModel, WeightSender]]:
    model = sized_qwen3()
    with WeightSender.from_hf(
        model.named_parameters(),
        engines=served.server.url,
        token=TOKEN,
        config=model.config,
        direction=direction,
    ) as sender:
        yield model, sender


def _step(
    served: Served, model: PreTrainedModel, sender: WeightSender, version: int, mode: Mode = "auto"
) -> SenderReport:
    """Change every weight and send it; the server then answers as the model does."""
    for parameter in model.parameters():
        parameter.data.mul_(0.97)
    report = sender.update(version, mode=mode)
    assert served.server.greedy(PROMPT, 8) == greedy(model, PROMPT, 8)
    return report


def _says_which_way_bytes_went(report: SenderReport, update: UpdateReport) -> None:
    """In this update: the plan, which was made at connect, knew of none that lands directly."""
    assert ("through the loader" in str(report)) == (update.loader_bytes > 0)
    assert ("MB direct" in str(report)) == (update.direct_bytes > 0)


def _unpacked_bytes(model: PreTrainedModel) -> int:
    """Of what engines serve as it is loaded, whatever their kernels."""
    names = re.compile(r"(norm|embed_tokens|lm_head)\.weight$")
    return sum(each.nbytes for name, each in model.named_parameters() if names.search(name))


def _landed_without_a_copy(update: UpdateReport, whole: int) -> None:
    assert update.direct_bytes == update.bytes_needed == whole
    assert update.peak_extra_bytes <= whole // 100
