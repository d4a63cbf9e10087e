"""The OpenAPI document is the contract: what it must say of every route, on every engine alike."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from engine_plugins.admin.error_responses import codes_of
from engine_plugins.admin.routes import SCOPES
from tests.support.admin_server import AdminServer
from tests.support.documented import document
from tests.support.engine_server import ROOT

Json = dict[str, Any]
MakeServer = Callable[..., AdminServer]
OTHER = ROOT / ".venv" / "sglang" / "bin" / "python"
PRINT = "import json; from tests.support.documented import document; print(json.dumps(document()))"


def operations() -> Iterator[tuple[str, str, Json]]:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def every_part(part: Any) -> Iterator[Json]:
    """Every object of the document, at any depth."""
    if isinstance(part, dict):
        yield part
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from every_part(each)


@pytest.mark.skipif(not OTHER.exists(), reason="SGLang's environment is not installed")
def test_both_engines_documents_are_one() -> None:
    """Another release of FastAPI makes the same of it."""
    done = subprocess.run(
        [OTHER, "-c", PRINT], cwd=ROOT, capture_output=True, check=True, env={"PYTHONPATH": "."}
    )
    assert json.loads(done.stdout) == document()


@pytest.mark.anyio
async def test_a_server_gives_this_document(make_server: MakeServer) -> None:
    """Beside the place that it is mounted at."""
    server = make_server()
    async with server.running():
        given = (await server.get("/openapi.json")).json()
    assert given.pop("servers") == [{"url": "/admin/v1"}]
    assert given == document()


def test_every_operation_says_who_may_call_it_and_what_comes_back() -> None:
    """Scope, tag, a name of its own, a schema of the answer, and the errors of every layer."""
    names = set()
    for method, path, operation in operations():
        told = f"{method} {path}"
        scope = SCOPES[method, path]
        assert operation["security"] == [{"bearer": [scope]}], told
        assert f"scope `{scope}`" in operation["description"], told
        assert operation["tags"], told
        assert re.fullmatch(r"[a-z]+([A-Z][a-z]+)+", operation["operationId"]), told
        names.add(operation["operationId"])
        answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert answer["$ref"].startswith("#/components/schemas/"), told
        assert {"401", "403", "408", "413", "500", "503"} <= operation["responses"].keys(), told
        assert ("400" in operation["responses"]) == ("requestBody" in operation), told
    assert len(names) == len(SCOPES)
    assert document()["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


def test_every_error_is_a_problem_with_its_codes() -> None:
    """FastAPI's own error, which is never sent, is not there."""
    assert "HTTPValidationError" not in json.dumps(document())
    for status, answer in document()["components"]["responses"].items():
        assert list(answer["content"]) == ["application/problem+json"]
        assert codes_of(int(status))
        for code in codes_of(int(status)):
            assert f"`{code}`" in answer["description"], status
        assert ("Retry-After" in answer["headers"]) == (status in ("409", "503", "504"))
    assert {"code", "state", "remedy", "detail"} <= set(
        document()["components"]["schemas"]["Problem"]["required"]
    )


def test_every_reference_leads_somewhere_and_every_schema_is_one() -> None:
    for part in every_part(document()):
        if "$ref" in part:
            target: Any = document()
            for name in part["$ref"].removeprefix("#/").split("/"):
                target = target[name]
    for schema in document()["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
        assert schema["description"]


def test_bodies_have_words_for_every_field_and_examples_that_are_true() -> None:
    """And no field beside those."""
    seen = 0
    for _, path, operation in operations():
        content = operation.get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema")
        if schema is None or path == "/weights/sources":
            continue
        body = document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert body["additionalProperties"] is False
        assert all(field["description"] for field in body["properties"].values()), path
        for example in body["examples"]:
            Draft202012Validator(body).validate(example)
            seen += 1
    assert seen == 10


def test_a_manifest_is_named_in_both_its_forms_and_packed() -> None:
    operation = document()["paths"]["/weights/sources"]["post"]
    content = operation["requestBody"]["content"]
    assert set(content) == {"application/msgpack", "application/json"}
    assert content["application/json"]["schema"]["$ref"].endswith("/SourceManifest")
    (encoding,) = operation["parameters"]
    assert (encoding["name"], encoding["schema"]["enum"]) == ("Content-Encoding", ["gzip"])


def test_words_of_the_source_are_words_of_the_document() -> None:
    """Of a struct, of one that it extends, and of a model."""
    schemas = document()["components"]["schemas"]
    report = schemas["UpdateReport"]["properties"]
    assert report["gbps"]["description"].startswith("Gigabytes (1e9 bytes) per second")
    assert schemas["MemoryReport"]["properties"]["verdict"]["description"] == "Of the worst device."
    assert schemas["PauseView"]["properties"]["until"]["description"].startswith("Unix seconds")
