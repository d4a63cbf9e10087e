"""Every route of vLLM's own is known: it is closed, or it leaves the engine's state alone."""

from __future__ import annotations

from typing import get_args

import pytest
from fastapi import FastAPI
from starlette.routing import Route
from vllm import tasks
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.support.closed_routes import check_closed
from vllm_ext.closed_routes import INSTEAD, close_routes

OPEN = {
    "answers requests": """
        /v1/chat/completions /v1/chat/completions/batch /v1/completions /v1/responses
        /v1/responses/{response_id} /v1/responses/{response_id}/cancel /v1/messages
        /v1/messages/count_tokens /generative_scoring /inference/v1/generate /invocations
        /v1/systemone /tokenize /detokenize /v1/audio/transcriptions /v1/audio/translations
        /v1/chat/completions/render /v1/messages/render /v1/completions/render
        /v1/responses/render /v1/chat/completions/derender /v1/completions/derender
        /pooling /classify /score /v1/score /rerank /v1/rerank /v2/rerank /v1/embeddings /v2/embed
    """,
    "reads": """
        /openapi.json /docs /docs/oauth2-redirect /redoc /load /version /kv_event_sources /health
        /metrics /v1/models /ping /server_info /is_sleeping /is_paused /weight_info /get_world_size
        /is_scaling_elastic_ep /fault_tolerance/status /tokenizer_info
    """,
    "flushes a cache": "/reset_prefix_cache /reset_mm_cache /reset_encoder_cache",
    "ends requests": "/abort_requests /inference/v1/abort_requests",
    "loads an adapter": """
        /v1/load_lora_adapter /v1/unload_lora_adapter /adapters /adapters/{adapter_name}
    """,
}


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """VLLM's application with all of its routes."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--enable-fault-tolerance", "--enable-tokenizer-info-endpoint"]
    )
    app: FastAPI = build_app(arguments, get_args(tasks.SupportedTask))
    return app


def paths_of(app: FastAPI) -> set[str]:
    return {route.path for route in app.routes if isinstance(route, Route)}


def test_a_new_route_of_vllms_is_noticed(everything: FastAPI) -> None:
    """One that is neither closed nor known to be harmless: look what it does, and enter it."""
    harmless = {path for paths in OPEN.values() for path in paths.split()}
    assert paths_of(everything) - harmless == set(INSTEAD)


def test_every_closed_route_answers_409_and_names_what_to_call(everything: FastAPI) -> None:
    """By any method and in the router's own reading of the path; the others are untouched."""
    before = len(everything.routes)
    close_routes(everything)
    assert len(everything.routes) == before + len(INSTEAD)
    check_closed(everything, INSTEAD, open_route="/version")
