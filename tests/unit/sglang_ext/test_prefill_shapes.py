"""SGLang's requests in the gate's terms, made by SGLang's own classes."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ext.prefill_shapes import HELD_BYTES_PER_LOGPROB, PrefillShapes

SHAPES = PrefillShapes(one_by_one=False)


def request(prompt: int, *, computed: int = 0, logprobs_from: int | None = None) -> Any:
    """A request as it stands in SGLang's queue after it was matched against the cache."""
    made = Req(
        rid="1",
        origin_input_text="",
        origin_input_ids=array("q", range(prompt)),
        sampling_params=SamplingParams(max_new_tokens=4),
        return_logprob=logprobs_from is not None,
    )
    made.logprob_start_len = -1 if logprobs_from is None else logprobs_from
    made.refresh_fill_ids()
    made.prefix_len = computed
    return made


def batch(*parts: tuple[Any, int], mode: ForwardMode = ForwardMode.EXTEND) -> Any:
    """The fields of a batch that say what it computes: requests with their numbers of tokens."""
    return SimpleNamespace(
        reqs=[each for each, _ in parts],
        forward_mode=mode,
        prefix_lens=[each.prefix_len for each, _ in parts],
        extend_lens=[tokens for _, tokens in parts],
    )


def test_a_prompt_wants_what_is_missing_up_to_the_steps_rest() -> None:
    whole = SHAPES.candidate(request(100, computed=32), None, refusable=True)
    assert (whole.wanted, whole.prompt_tokens, whole.computed) == (68, 100, 32)
    assert not whole.divisible
    assert not whole.prompt_logprobs
    assert whole.held_bytes_per_token == 0
    part = SHAPES.candidate(request(100), 48, refusable=False)
    assert (part.wanted, part.divisible, part.refusable) == (48, True, False)


def test_only_a_prompt_of_the_probes_size_is_exempt() -> None:
    """The name alone is a field of a client's body."""
    for tokens, exempt in ((1, True), (2, False), (100_000, False)):
        named = request(tokens)
        named.rid = "HEALTH_CHECK_1"
        assert SHAPES.candidate(named, None, refusable=True).exempt == exempt
    assert not SHAPES.candidate(request(1), None, refusable=True).exempt


@pytest.mark.parametrize(
    ("start", "tokens", "rows"), [(0, 100, 100), (60, 100, 40), (60, 50, 0), (99, 100, 1)]
)
def test_rows_begin_where_logprobs_were_asked_for(start: int, tokens: int, rows: int) -> None:
    asked = request(100, logprobs_from=start)
    shape = SHAPES.batch(batch((asked, tokens)))
    assert shape.prompt_logprob_rows == rows
    assert SHAPES.candidate(asked, tokens, refusable=True).prompt_logprobs == (rows > 0)


def test_what_logprobs_keep_counts_with_the_first_chunk() -> None:
    first, later = request(100, logprobs_from=0), request(100, computed=50, logprobs_from=0)
    held = 2 * HELD_BYTES_PER_LOGPROB * 100
    assert SHAPES.batch(batch((first, 50))).held_bytes == held
    assert SHAPES.batch(batch((later, 50))).held_bytes == 0
    candidate = SHAPES.candidate(first, 50, refusable=True)
    assert candidate.held_bytes_per_token * candidate.prompt_tokens == held


def test_a_batch_is_the_sum_of_its_parts() -> None:
    shape = SHAPES.batch(batch((request(100), 100), (request(80, computed=30), 50)))
    assert (shape.tokens, shape.rows) == (150, 2)
    assert shape.context == 100 + 80
    assert shape.pairs == 100 * 100 + 50 * 80


def test_where_contexts_are_gathered_one_by_one_the_longest_counts() -> None:
    one_by_one = PrefillShapes(one_by_one=True)
    assert one_by_one.batch(batch((request(100), 100), (request(80), 80))).context == 100


def test_a_decode_is_a_token_of_each() -> None:
    shape = SHAPES.batch(batch((request(9), 1), (request(9), 1), mode=ForwardMode.DECODE))
    assert (shape.tokens, shape.rows, shape.context) == (2, 2, 0)
