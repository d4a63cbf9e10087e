"""Holding answers of the admin routes against the OpenAPI document."""

from __future__ import annotations

import functools
from typing import Any, cast

import httpx
from jsonschema import Draft202012Validator

from engine_plugins.admin.document import DocumentedApi
from engine_plugins.admin.mount import PREFIX
from engine_plugins.admin.routes import SCOPES, admin_router
from engine_plugins.admin.service import AdminService

__all__ = ["check_answer", "check_answer_async", "document", "undocumented"]

Json = dict[str, Any]

OUTSIDE = {401, 404, 405, 503}
"""What a request is answered that no route takes: with a problem, and in no operation."""


@functools.cache
def document() -> Json:
    """The document of this checkout, under the FastAPI of this environment."""
    router = admin_router(cast(AdminService, None), max_manifest_bytes=1)
    return DocumentedApi(router.routes, SCOPES).openapi()


def check_answer(response: httpx.Response) -> None:
    """An event hook of httpx clients: no undocumented status, media type, header or body."""
    response.read()
    assert not (fault := undocumented(response)), fault


async def check_answer_async(response: httpx.Response) -> None:
    """The same for asynchronous clients."""
    await response.aread()
    assert not (fault := undocumented(response)), fault


def undocumented(response: httpx.Response) -> str:
    """What of an answer the document does not say; empty if nothing."""
    # A proxy's path may come before it.
    method, path = response.request.method, response.request.url.path.rpartition(PREFIX)[2]
    if path == "/openapi.json" and response.status_code == 200:
        return ""
    told = f"{method} {path} answered {response.status_code} {response.text[:300]}: "
    if "x-request-id" not in response.headers:
        return told + "no X-Request-Id"
    operation = document()["paths"].get(path, {}).get("get" if method == "HEAD" else method.lower())
    if operation is None:
        return _fault_outside(response, told)
    answer = operation["responses"].get(str(response.status_code))
    if answer is None:
        return told + "a status that the document does not have"
    answer = _resolved(answer)
    kind = response.headers["content-type"]
    if kind not in answer["content"]:
        return told + f"the media type {kind}"
    if response.headers.keys() & {"retry-after", "www-authenticate", "allow"} - {
        name.lower() for name in answer["headers"]
    }:
        return told + f"headers {dict(response.headers)}"
    if method == "HEAD":
        return "" if not response.content else told + "a body"
    return _faults_of_body(response, answer["content"][kind]["schema"], told)


def _fault_outside(response: httpx.Response, told: str) -> str:
    if response.status_code not in OUTSIDE:
        return told + "and no operation of the document has this path and method"
    if response.request.method == "HEAD":
        return ""
    if response.status_code == 405 and "allow" not in response.headers:
        return told + "no Allow"
    return _faults_of_body(response, {"$ref": "#/components/schemas/Problem"}, told)


def _faults_of_body(response: httpx.Response, schema: Json, told: str) -> str:
    faults = [
        f"{error.json_path}: {error.message[:200]}"
        for error in _validator(schema["$ref"]).iter_errors(response.json())
    ]
    return told + "; ".join(faults[:5]) if faults else ""


@functools.cache
def _validator(ref: str) -> Any:
    """Of a component, in which a field that is not documented is a fault too."""
    return Draft202012Validator({"$ref": ref, "components": _closed(document()["components"])})


def _closed(part: Any) -> Any:
    if isinstance(part, list):
        return [_closed(each) for each in part]
    if not isinstance(part, dict):
        return part
    closed = {key: _closed(value) for key, value in part.items()}
    if part.get("type") == "object" and "properties" in part:
        closed.setdefault("additionalProperties", False)
    return closed


def _resolved(answer: Json) -> Json:
    name = answer.get("$ref", "").rpartition("/")[2]
    return document()["components"]["responses"][name] if name else answer
