"""Every route of SGLang's own is known: it is closed, or it leaves the engine's state alone."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import FastAPI
from sglang.srt.utils.auth import AuthLevel, _get_auth_level_from_app_and_scope

from sglang_ext.closed_routes import INSTEAD, close_routes
from tests.support.closed_routes import check_closed
from tests.support.preloaded import PreloadedProcess, preloaded
from tests.support.sglang_server import IMPORTED, ON_CPU

MARK = "path "
LIST_PATHS = f"""
import os
from fastapi.routing import iter_route_contexts
from sglang.srt.entrypoints.http_server import app
for route in iter_route_contexts(app.routes):
    print("{MARK}" + route.path)
os.sys.stdout.flush()
os._exit(0)  # SGLang's extensions do not survive the interpreter's own end
"""

OPEN = {
    "answers requests": """
        /generate /encode /classify /v1/completions /v1/chat/completions /v1/embeddings
        /v1/classify /tokenize /v1/tokenize /detokenize /v1/detokenize /v1/audio/transcriptions
        /v1/realtime /v1/score /v1/decisions /v1/responses /v1/responses/{response_id}
        /v1/responses/{response_id}/cancel /v1/rerank /api/chat /api/generate /api/show
        /v1/messages /v1/messages/count_tokens /v1/systemone /invocations /vertex_generate
        /parse_function_call /separate_reasoning /open_session /close_session
    """,
    "reads": """
        /openapi.json /docs /docs/oauth2-redirect /redoc /v1/loads /is_scaling_elastic_ep /ready
        /health /health_generate /get_model_info /model_info /get_server_info /server_info
        /list_external_corpora /get_hicache_l3_cache_layout /remote_instance_transfer_engine_info
        /get_remote_instance_transfer_engine_info /get_weights_by_name /v1/models
        /v1/models/{model:path} /api/tags /ping /
    """,
    "flushes a cache": "/flush_cache /hicache/storage-backend/clear",
    "chooses where KV is kept": "/hicache/storage-backend",
    "ends requests": "/abort_request",
    "loads an adapter, or text to draft from": """
        /load_lora_adapter /load_lora_adapter_from_tensors /unload_lora_adapter
        /add_external_corpus /remove_external_corpus
    """,
    "profiles and logs": """
        /start_profile /stop_profile /set_trace_level /freeze_gc /configure_logging
        /start_expert_distribution_record /stop_expert_distribution_record
        /dump_expert_distribution_record
    """,
    "sets limits of the scheduler": "/set_internal_state",
}


def sglangs_paths(folder: Path) -> set[str]:
    """All of its application, which is imported where it has been before."""
    told = folder / "paths"
    with told.open("w") as output, open(os.devnull) as nothing:
        process = PreloadedProcess(
            preloaded(*IMPORTED, OMP_NUM_THREADS="1", **ON_CPU),
            ["-c", LIST_PATHS],
            environment={**os.environ, **ON_CPU},
            files=(nothing.fileno(), output.fileno(), output.fileno()),
        )
        assert process.wait(60) == 0, told.read_text()
    return {line.removeprefix(MARK) for line in told.read_text().split("\n") if MARK in line}


def test_a_new_route_of_sglangs_is_noticed(tmp_path: Path) -> None:
    """One that is neither closed nor known to be harmless: look what it does, and enter it."""
    harmless = {path for paths in OPEN.values() for path in paths.split()}
    assert sglangs_paths(tmp_path) - harmless == set(INSTEAD)


def test_every_closed_route_answers_409_and_names_what_to_call() -> None:
    """By any method, in the router's own reading of the path; what else there is stays open."""
    app = FastAPI()
    close_routes(app)
    check_closed(app, INSTEAD, open_route="/openapi.json")


def test_a_closed_route_asks_for_the_key_that_the_open_one_asked_for() -> None:
    """SGLang's key check finds a route's level by the first route that takes the request."""
    app = FastAPI()
    close_routes(app)
    for path in INSTEAD:
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "root_path": ""}
        assert _get_auth_level_from_app_and_scope(app, scope) is AuthLevel.ADMIN_OPTIONAL
