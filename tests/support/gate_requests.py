"""Requests on the generating routes of an engine, whole or as a stream, for the prefill gate."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.engine_server import EngineServer

__all__ = ["ROUTES", "asked", "words"]

ROUTES = {
    "vllm": ("/v1/completions", "/v1/chat/completions", "/v1/responses"),
    "sglang": ("/generate", "/v1/completions", "/v1/chat/completions"),
}
"""By the kind of the engine."""


def asked(
    server: EngineServer, route: str, tokens: int, *, stream: bool, **more: Any
) -> httpx.Response:
    """The whole answer to a prompt, by a server that has the tokenizer of `gate_models`.

    Args:
        server: to ask.
        route: one of `ROUTES`.
        tokens: of the prompt.
        stream: whether the answer is to come as events.
        more: fields of the body.
    """
    body: dict[str, Any] = {"stream": stream, "temperature": 0, "max_tokens": 2}
    if route == "/generate":
        body = {"text": words(tokens), "stream": stream, "sampling_params": {"max_new_tokens": 2}}
    elif route == "/v1/responses":
        body = {"input": words(tokens), "stream": stream, "max_output_tokens": 2}
    elif route == "/v1/completions":
        body["prompt"] = words(tokens)
    else:
        body["messages"] = [{"role": "user", "content": words(tokens)}]
    if server.kind == "sglang":
        body["model"] = "any"
    return server.http.post(route, json={**body, **more})


def words(tokens: int) -> str:
    """A prompt: one word is one token."""
    return " ".join(["w1"] * tokens)
