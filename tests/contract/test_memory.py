"""An update in place stays within its memory, on a model that is larger than the bound."""

from __future__ import annotations

from engine_plugins import WeightSender
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
    weights.
    """
    model, server = sized_qwen3(), served.server
    whole = sum(parameter.nbytes for parameter in model.parameters())
    with WeightSender.from_hf(
        model.named_parameters(), engines=server.url, token=TOKEN, config=model.config
    ) as sender:
        for version in (1, 2, 3):
            for parameter in model.parameters():
                parameter.data.mul_(0.97)
            report = sender.update(version)
            (plan,), (update,) = report.plans.values(), report.engines.values()
            largest = plan.ranks[0].largest_step_bytes
            bound = served.engine.peak_modules * largest + (32 << 20)
            assert whole > bound, "the model is too small to show anything"
            assert plan.ranks[0].arena_bytes < 2 * largest
            if served.engine.feeds_peers and version > 1:
                assert update.direct_bytes == update.bytes_needed == whole
                assert update.peak_extra_bytes <= whole // 100, f"update {version}"
            else:
                assert largest < update.peak_extra_bytes < bound, f"update {version}"
            assert server.greedy(PROMPT, 8) == greedy(model, PROMPT, 8)
