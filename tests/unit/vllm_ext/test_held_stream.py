"""The mark of a held answer reaches the core, and a hold ends when every sequence has spoken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from starlette.types import Message
from vllm.exceptions import RetryableRequestError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from engine_plugins.admin.held_answer import HeldAnswer
from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from engine_plugins.admin.state import Fence, moved
from engine_plugins.errors import EnginePluginError, MemoryPressureError, PromptTooLargeError
from vllm_ext.held_stream import all_have_spoken, explained, is_marked_as_held, marked_as_held
from vllm_ext.prefill_refusal import RefusedPrefillError, stop_reason_of

TOO_LARGE = PromptTooLargeError("never", remedy="send at most 7 tokens", largest_prompt=7)
PRESSURE = MemoryPressureError("not now", remedy="try again after 5 s", retry_after_s=5)
Said = tuple[int, list[int], str | None]
"""Of a sequence: its index, new tokens, and why it ended."""
TOKEN: Said = (0, [7], None)
ENDED: Said = (0, [], "error")


def _received(params: SamplingParams) -> SamplingParams:
    """As the engine's core gets them."""
    request = EngineCoreRequest(
        request_id="1",
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    decoded = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))
    assert decoded.sampling_params is not None
    received: SamplingParams = decoded.sampling_params
    return received


def test_the_mark_is_the_requests_own() -> None:
    """A route uses its parameters again for the next turn, whose answer has begun."""
    params = SamplingParams(extra_args={"other": 1}, max_tokens=3)
    received = _received(marked_as_held(params))
    assert is_marked_as_held(received)
    assert received.extra_args is not None
    assert (received.extra_args["other"], received.max_tokens) == (1, 3)
    assert not is_marked_as_held(_received(params))
    assert not is_marked_as_held(_received(SamplingParams()))
    assert is_marked_as_held(_received(marked_as_held(SamplingParams())))


def _output(*said: Said, stop_reason: str | None = None) -> RequestOutput:
    return RequestOutput(
        request_id="1",
        prompt=None,
        prompt_token_ids=[1],
        prompt_logprobs=None,
        outputs=[
            CompletionOutput(
                index=index,
                text="",
                token_ids=token_ids,
                cumulative_logprob=None,
                logprobs=None,
                finish_reason=reason,
                stop_reason=stop_reason,
            )
            for index, token_ids, reason in said
        ],
        finished=False,
    )


def test_every_sequence_has_spoken_or_ended() -> None:
    spoken = all_have_spoken(3)
    assert not spoken(_output((1, [7], None)))
    assert not spoken(_output((1, [7], None), (0, [], None)))
    assert not spoken(_output((0, [7], None)))
    assert spoken(_output((2, [], "abort")))
    assert all_have_spoken(1)(_output((0, [7], None)))


@pytest.fixture
def shared(tmp_path: Path) -> SharedState:
    create_runtime_dir(tmp_path)
    return SharedState(tmp_path)


async def _outputs(*outputs: RequestOutput) -> AsyncGenerator[RequestOutput, None]:
    for output in outputs:
        yield output


async def _nobody(_: Message) -> None:
    raise AssertionError("something was sent")


async def _told(shared: SharedState, held: HeldAnswer | None, *outputs: RequestOutput) -> int:
    """How many outputs a route gets."""
    return len([each async for each in explained(_outputs(*outputs), shared, held)])


@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"), [(TOO_LARGE, 413, None), (PRESSURE, 503, "5")]
)
def test_a_refusal_is_raised_and_is_the_held_answer(
    shared: SharedState, refusal: EnginePluginError, status: int, retry_after: str | None
) -> None:
    """Even after tokens, as long as none has been sent: another sequence of the answer waits."""
    held = HeldAnswer(_nobody)
    refused = _output(ENDED, stop_reason=stop_reason_of(refusal))
    with pytest.raises(RefusedPrefillError, match=refusal.message):
        asyncio.run(_told(shared, held, _output(TOKEN), refused))
    assert held.refusal is not None
    assert held.refusal.status_code == status
    assert held.refusal.headers.get("retry-after") == retry_after
    assert refusal.remedy in bytes(held.refusal.body).decode()


def test_a_fence_is_the_held_answer_too(shared: SharedState) -> None:
    fence = Fence(code="x", detail="half-new weights", remedy="update", attempted_version=2)
    shared.change(lambda state: moved(state, "fenced", fence=fence))
    held = HeldAnswer(_nobody)
    with pytest.raises(RetryableRequestError, match="half-new weights"):
        asyncio.run(_told(shared, held, _output(ENDED)))
    assert held.refusal is not None
    assert held.refusal.status_code == 503


def test_without_a_held_answer_it_is_raised_before_the_first_token_only(
    shared: SharedState,
) -> None:
    refused = _output(ENDED, stop_reason=stop_reason_of(PRESSURE))
    with pytest.raises(RefusedPrefillError, match="not now"):
        asyncio.run(_told(shared, None, refused))
    assert asyncio.run(_told(shared, None, _output(TOKEN), refused)) == 2


def test_an_end_that_is_none_of_ours_is_passed_on(shared: SharedState) -> None:
    assert asyncio.run(_told(shared, HeldAnswer(_nobody), _output(TOKEN), _output(ENDED))) == 2
