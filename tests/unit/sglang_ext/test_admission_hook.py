"""The answer to several prompts is held until each has spoken, and ends when one is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from sglang.srt.managers.io_struct import GenerateReqInput
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from engine_plugins.admin.held_answer import RefuseBeforeStream
from engine_plugins.admin.runtime_dir import RUNTIME_DIR
from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from engine_plugins.errors import PromptTooLargeError
from sglang_ext import admission_hook
from sglang_ext.refused_prefill import RefusedPrefill
from tests.support.gate_board import publish_gate

REFUSAL = RefusedPrefill(
    PromptTooLargeError("never", remedy="send at most 7 tokens", largest_prompt=7)
)
REFUSED: dict[str, Any] = {"meta_info": {"finish_reason": REFUSAL.to_json()}}
Output = dict[str, Any]


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a server whose gate is in force."""
    create_runtime_dir(tmp_path)
    publish_gate(tmp_path, "enforce")
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path))
    admission_hook._shared.cache_clear()
    yield tmp_path
    admission_hook._shared.cache_clear()


class Manager:
    """SGLang's tokenizer manager, as far as one stream goes through it.

    Args:
        outputs: of the stream, in turn; those that say an abort pass by SGLang's own method.
    """

    is_pause = False

    def __init__(self, outputs: list[Output]) -> None:
        self._outputs = outputs
        self.closed_early = False

    async def generate_request(
        self, request: GenerateReqInput, http_request: object
    ) -> AsyncGenerator[Output, None]:
        request.normalize_batch_and_arguments()
        try:
            for output in self._outputs:
                if "meta_info" in output:
                    await admission_hook.abort_reason(_nothing, self, output)
                yield output
        except GeneratorExit:
            self.closed_early = True
            raise


async def _nothing(*_: Any) -> None:
    """SGLang's own part in an abort."""


def _streamed(runtime_dir: Path, manager: Manager, **fields: Any) -> httpx.Response:
    """The answer to a stream by a route as SGLang's are."""

    def events() -> AsyncIterator[str]:
        return _events(_generated(manager, GenerateReqInput(stream=True, **fields)))

    return _answer(runtime_dir, events)


def _generated(manager: Manager, request: GenerateReqInput) -> AsyncGenerator[Output, None]:
    return admission_hook.generate_request(Manager.generate_request, manager, request)


async def _events(outputs: AsyncGenerator[Output, None], *begin: str) -> AsyncIterator[str]:
    for event in begin:
        yield event
    async for output in outputs:
        yield f"{output.get('index', 0)} "


def _answer(runtime_dir: Path, events: Callable[[], AsyncIterator[str]]) -> httpx.Response:
    async def route(_: Request) -> Response:
        return StreamingResponse(events())

    async def get() -> httpx.Response:
        app = Starlette(
            routes=[Route("/", route)],
            middleware=[Middleware(RefuseBeforeStream, shared=SharedState(runtime_dir))],
        )
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.get("/")

    return asyncio.run(get())


SAMPLED = {"input_ids": [[1], [2]], "sampling_params": {"n": 2}}


def test_a_prompt_that_is_refused_after_others_spoke_is_the_answer(runtime_dir: Path) -> None:
    """And what the others still have to say is not waited for."""
    first, second = {"index": 0}, {"index": 1}
    manager = Manager([first, second, first, {**REFUSED, "index": 2}, first])
    answer = _streamed(runtime_dir, manager, **SAMPLED)
    assert answer.status_code == 413
    assert answer.json()["largest_prompt"] == 7
    assert manager.closed_early


def test_once_all_have_spoken_it_has_begun(runtime_dir: Path) -> None:
    outputs: list[Output] = [{"index": index} for index in (0, 1, 3, 2)]
    manager = Manager([*outputs, {**REFUSED, "index": 2}, {"index": 1}])
    answer = _streamed(runtime_dir, manager, **SAMPLED)
    assert (answer.status_code, answer.text) == (200, "0 1 3 2 2 1 ")


def test_a_single_prompt_is_refused_or_answered(runtime_dir: Path) -> None:
    assert _streamed(runtime_dir, Manager([REFUSED]), input_ids=[1]).status_code == 413
    assert _streamed(runtime_dir, Manager([{}, {}]), input_ids=[1]).text == "0 0 "


def test_a_route_that_tells_of_itself_first_is_held_to_the_first_turn(runtime_dir: Path) -> None:
    """As the Responses route does."""

    def turns(_: None, outputs: list[Output]) -> AsyncGenerator[Output, None]:
        return _generated(Manager(outputs), GenerateReqInput(stream=True, input_ids=[1]))

    def told(outputs: list[Output]) -> httpx.Response:
        return _answer(
            runtime_dir,
            lambda: _events(admission_hook.answer_turns(turns, None, outputs), "created "),
        )

    assert told([REFUSED]).status_code == 413
    assert told([{}, {}]).text == "created 0 0 "


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rid", ["HEALTH_CHECK_1", ["mine", "HEALTH_CHECK_1"]])
def test_no_client_takes_the_name_of_sglangs_probe(
    runtime_dir: Path, rid: str | list[str], stream: bool
) -> None:
    """SGLang would drop the request while busy, and the gate and a fence would let it in."""
    manager = Manager([{}, {}])
    prompts = [[1], [2]] if isinstance(rid, list) else [1]
    request = GenerateReqInput(input_ids=prompts, rid=rid, stream=stream)
    outputs = _generated(manager, request)
    with pytest.raises((HTTPException, ValueError), match="HEALTH_CHECK") as refused:
        asyncio.run(anext(outputs))
    assert getattr(refused.value, "status_code", None) == 400
