"""SGLang's own health probe, told from a request that only bears its name.

SGLang knows its probe by how the request id begins, which is a field of a client's body as well. A
busy scheduler drops a probe without an answer, and the prefill gate lets one in unasked.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.utils import is_health_check_generate_req

__all__ = ["bears_its_name", "comes_from_its_route", "is_probe"]

PROMPT_TOKENS = 1
_ENDPOINT = "health_generate"
"""SGLang's function behind /health and /health_generate."""


def bears_its_name(request: Any) -> bool:
    """Whether a request, or one of a batch, has an id that SGLang takes for its probe's."""
    ids = request.rid if isinstance(request.rid, list) else [request.rid]
    return any(isinstance(each, str) and each.startswith(HEALTH_CHECK_RID_PREFIX) for each in ids)


def comes_from_its_route(http_request: Any) -> bool:
    """Whether SGLang's health route made a request; the router says which route it ran."""
    endpoint = None if http_request is None else http_request.scope.get("endpoint")
    return getattr(endpoint, "__name__", None) == _ENDPOINT


def is_probe(request: Any, prompt_tokens: int) -> bool:
    """Whether a request of a scheduler is the probe; no larger prompt is one, whatever its id."""
    return prompt_tokens <= PROMPT_TOKENS and is_health_check_generate_req(request)
