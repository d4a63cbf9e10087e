"""The OpenAPI document: what FastAPI knows of the routes, and what only the layers around it know.

Those layers send the errors, want the token, bound the bodies, and encode most answers without
FastAPI. The document is the contract, so it names all that; a test holds every answer against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.routing import BaseRoute

from engine_plugins.admin.error_responses import codes_of
from engine_plugins.admin.route_table import RouteKey
from engine_plugins.admin.schemas import STRUCT, MemoryReport, Problem
from engine_plugins.admin.struct_schemas import struct_schemas
from engine_plugins.admin.token_book import TokenScope
from engine_plugins.admin_answers import EngineOffer
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport

__all__ = ["DocumentedApi"]

Json = dict[str, Any]

_STRUCTS = (EngineOffer, MemoryReport, PlanSummary, SourceManifest, UpdateReport)
_REF = "#/components/schemas/{name}"

_EVERYWHERE = (401, 403, 408, 413, 500, 503)
"""A body that is not wanted is read all the same, within its bounds."""
_OF_BODIES = (400,)
_OF_THE_ENGINE = (409, 422, 504)
_ONLY_READ = {("GET", "/state"), ("GET", "/weights")}
_BY_ID = {"/weights/connect", "/weights/update", "/weights/prepare"}
_BY_ID |= {"/weights/commit", "/weights/abort"}
_OF_MEMORY = {"/sleep", "/wake"}

_WHEN = {
    400: "The body cannot be read, or has a wrong type or an unknown field.",
    401: "No token, or not one of this server's.",
    403: "The token lacks the scope of this route.",
    404: "No source, plan or prepared update has this id.",
    408: "The body stopped coming.",
    409: "Illegal in the engine's state, or the version is not newer.",
    413: "The body is over this route's limit.",
    422: "Well-formed, and nothing that this engine can do.",
    500: "The engine failed, or this is a bug; `detail` says which.",
    503: "Closed, fenced, a peer is gone, or the machine has run out; `remedy` says what to do.",
    504: "A deadline passed; `detail` says who is late.",
    507: "Memory is not free, or cannot be released or mapped.",
}
_RETRY_AFTER = (409, 503, 504)
_REQUEST_ID = {
    "description": "The request's own, or one that was made up: the server's log has it.",
    "schema": {"type": "string"},
}


class DocumentedApi(FastAPI):
    """The routes of the admin contract with their whole document.

    Args:
        routes: of the admin router.
        scopes: the scope that each of them needs.
    """

    def __init__(self, routes: list[BaseRoute], scopes: Mapping[RouteKey, TokenScope]) -> None:
        super().__init__(
            title="engine-plugins admin",
            description="Drives one inference server: its state, its memory and its weights.",
            version="1",
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,  # a redirect goes wherever the request's Host header says
            # An included router would hide its routes from the route table, from FastAPI 0.137 on.
            routes=routes,
        )
        self._scopes = scopes
        self._document: Json | None = None

    def openapi(self) -> Json:
        """The document, made once."""
        if self._document is None:
            self._document = self._whole_document()
        return self._document

    def _whole_document(self) -> Json:
        document = get_openapi(
            title=self.title,
            version=self.version,
            description=self.description,
            openapi_version="3.1.0",
            routes=self.routes,
        )
        schemas = {
            name: schema
            for name, schema in document["components"]["schemas"].items()
            if name not in ("HTTPValidationError", "ValidationError")
        }
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= (
            problem.pop("$defs", {})
            | {"Problem": problem}
            | struct_schemas(_STRUCTS, ref_template=_REF)
        )
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                self._complete((method.upper(), path), operation)
        document["components"] = {
            "responses": {str(status): _problem_answer(status) for status in _WHEN},
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"bearer": _BEARER},
        }
        complete: Json = _plain(document)
        return complete

    def _complete(self, route: RouteKey, operation: Json) -> None:
        """Say of an operation what it needs, and every status that it answers with."""
        scope = self._scopes[route]
        operation["security"] = [{"bearer": [scope]}]
        operation["description"] += f"\n\nNeeds a token of scope `{scope}`."
        done = operation["responses"]["200"] | {
            "description": "Done.",
            "headers": {"X-Request-Id": _REQUEST_ID},
        }
        errors = {str(status): _response_ref(status) for status in _errors_of(route, operation)}
        operation["responses"] = {"200": done} | errors


_BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "A token of this server: ENGINE_PLUGINS_ADMIN_TOKEN has every scope, a line of "
    "ENGINE_PLUGINS_ADMIN_TOKEN_FILE the one that it names (read, control or weights).",
}


def _errors_of(route: RouteKey, operation: Json) -> list[int]:
    path = route[1]
    return sorted(
        {
            *_EVERYWHERE,
            *(_OF_BODIES if "requestBody" in operation else ()),
            *(() if route in _ONLY_READ else _OF_THE_ENGINE),
            *((404,) if path in _BY_ID else ()),
            *((507,) if path in _OF_MEMORY else ()),
        }
    )


def _response_ref(status: int) -> Json:
    return {"$ref": f"#/components/responses/{status}"}


def _problem_answer(status: int) -> Json:
    headers: Json = {"X-Request-Id": _REQUEST_ID}
    if status in _RETRY_AFTER:
        headers["Retry-After"] = {
            "description": "Seconds, where waiting helps; else there is none.",
            "schema": {"type": "integer", "minimum": 1},
        }
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}}
    codes = codes_of(status)
    return {
        "description": f"{_WHEN[status]} Codes: {', '.join(f'`{code}`' for code in codes)}.",
        "headers": headers,
        "content": {
            "application/problem+json": {
                "schema": {"$ref": _REF.format(name="Problem")},
                "example": {
                    "type": f"urn:engine-plugins:{codes[0]}",
                    "title": HTTPStatus(status).phrase,
                    "status": status,
                    "detail": "what was seen",
                    "code": codes[0],
                    "state": None if status == HTTPStatus.UNAUTHORIZED else "serving",
                    "remedy": "what to do",
                },
            }
        },
    }


def _plain(part: Any) -> Any:
    """The document with structs by reference, and every enumeration with its type."""
    if isinstance(part, list):
        return [_plain(each) for each in part]
    if not isinstance(part, dict):
        return part
    if STRUCT in part:
        return {"$ref": _REF.format(name=part[STRUCT])} | {
            key: value for key, value in part.items() if key in ("description", "default")
        }
    values = part.get("enum")
    if isinstance(values, list) and "type" not in part:
        kind = "string" if isinstance(values[0], str) else "integer"
        part = {"type": kind, **part}
    return {key: _plain(_whole(value)) for key, value in part.items()}


def _whole(value: object) -> object:
    """Bounds of integers, which FastAPI's own model of a schema holds as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
