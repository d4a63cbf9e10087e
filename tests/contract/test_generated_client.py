"""A client that a program made of the document drives every route, errors included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import pytest

from engine_plugins.weights.contract.manifest_batch import encode_batch
from tests.support.configurations import DENSE, NEW, OLD, on
from tests.support.documented import document
from tests.support.engine_server import TOKEN
from tests.support.generated_client import GeneratedClient
from tests.support.served import Served

pytestmark = on(DENSE)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> GeneratedClient:
    """Made once: that it is made of the server's own document is tested too."""
    return GeneratedClient(document(), tmp_path_factory.mktemp("generated"))


class Driver:
    """Calls of one server, each answer of a type of the document's."""

    def __init__(self, served: Served, generated: GeneratedClient) -> None:
        self.served, self.generated = served, generated
        self.called: set[str] = set()

    def __call__(self, operation: str, kind: str, status: int = 200, **fields: Any) -> Any:
        """Call an operation with the fields of its body; the parsed answer."""
        return self.with_token(TOKEN, operation, kind, status, **fields)

    def with_token(
        self, token: str, operation: str, kind: str, status: int = 200, **fields: Any
    ) -> Any:
        module: Any = self.generated.operations[operation]
        client = self.generated.with_token(self.served.server.url, token)
        with client:
            answer = module.sync_detailed(client=client, **fields)
        told = f"{operation}: {answer.status_code} {answer.content[:300]!r}"
        assert answer.status_code == status, told
        assert type(answer.parsed).__name__ == kind, told
        self.called.add(operation)
        return answer.parsed

    def fails(self, operation: str, status: int, code: str, **fields: Any) -> None:
        """Call it for the problem that it answers with."""
        problem = self(operation, "Problem", status, **fields)
        assert (problem.status, problem.code) == (status, code)
        assert problem.remedy
        assert problem.state.value == "serving"

    def body(self, kind: str, **fields: Any) -> Any:
        """A body of the document's types."""
        return getattr(self.generated.models, kind).from_dict(fields)


@pytest.fixture
def drive(served: Served, generated: GeneratedClient) -> Iterator[Driver]:
    served.restore(OLD)
    yield Driver(served, generated)
    served.write_tokens("read", "control", "weights")
    served.restore(OLD)


def test_a_server_gives_the_document_that_the_client_is_made_of(served: Served) -> None:
    given = served.server.admin.get("/openapi.json").json()
    assert given.pop("servers") == [{"url": "/admin/v1"}]
    assert given == document()


def test_every_route_answers_in_its_own_type(drive: Driver) -> None:
    """An update of each kind, a pause, a sleep and all that only looks."""
    assert drive("engine.get_state", "StateView").state.value == "serving"
    assert drive("engine.pause_engine", "StateView").state.value == "paused"
    assert drive("engine.resume_engine", "StateView").state.value == "serving"
    flushed = drive("engine.flush_caches", "Flushed", body=drive.body("FlushBody"))
    assert isinstance(flushed.flushed, list)
    asleep = drive("memory.sleep_engine", "SleepAnswer", body=drive.body("SleepBody", level=1))
    assert asleep.memory.verdict
    assert drive("memory.get_memory", "MemoryReport").rows
    assert drive("memory.wake_engine", "StateView").state.value == "serving"
    gate = drive("prefill_gate.get_prefill_gate", "GateView")
    changes = drive.body("GateBody", margin_quantile=gate.settings.margin_quantile)
    drive("prefill_gate.change_prefill_gate", "GateView", body=changes)
    drive("prefill_gate.reset_prefill_gate", "GateView")
    _update_each_way(drive)
    if drive.served.engine.feeds_peers:
        assert drive("weights.get_manifest", "EngineOffer").manifests
    else:  # its parameters are packed for its kernels
        drive.fails("weights.get_manifest", 409, "illegal_state")
    assert drive("weights.get_weights", "WeightsView").history[0].outcome.value == "installed"
    assert drive.called == drive.generated.operations.keys()
    for module in drive.generated.operations.values():
        assert hasattr(module, "sync"), "and gives the parsed answer alone"


def _update_each_way(drive: Driver) -> None:
    manifest = drive.served.offer(NEW).source.manifest
    plain = drive.generated.types.File(payload=msgspec.msgpack.encode(manifest))
    typed = drive.body("SourceManifest", **msgspec.json.decode(msgspec.json.encode(manifest)))
    sources = [
        drive("weights.add_source", "SourceAccepted", body=body).source_id
        for body in (plain, typed)
    ]
    assert sources[0] == sources[1], "the same manifest, in both its forms"
    many = drive.generated.types.File(payload=encode_batch([msgspec.msgpack.encode(manifest)]))
    batch = drive("weights.add_sources", "SourcesAccepted", body=many)
    assert batch.source_ids == sources[:1]
    connect = drive.body("ConnectBody", source_ids=sources[:1])
    plan = drive("weights.connect_sources", "PlanSummary", body=connect)
    assert plan.ranks

    def body(version: int) -> Any:
        name = f"generated {version}"
        return drive.body("UpdateBody", plan_id=plan.plan_id, version=version, request_id=name)

    first = drive.served.next_version()
    drive("weights.update_weights", "UpdateReport", body=body(first))
    for version, end, kind in (
        (first + 1, "weights.abort_weights", "AbortBody"),
        (first + 2, "weights.commit_weights", "CommitBody"),
    ):
        drive("weights.prepare_weights", "UpdateReport", body=body(version))
        drive(end, "UpdateReport", body=drive.body(kind, request_id=f"generated {version}"))


def test_every_error_is_a_problem_with_its_fields(drive: Driver) -> None:
    """401 to 409 had come back as None, and 422 had raised ValueError in the client."""
    update = partial(drive.body, "UpdateBody", plan_id="plan-0", version=1 << 40)
    drive.fails(
        *("engine.pause_engine", 400, "malformed_request"), body=drive.body("PauseBody", hold_s=-1)
    )
    drive.fails("weights.update_weights", 404, "unknown_id", body=update())
    drive.fails("weights.update_weights", 422, "unsupported", body=update(verify="full"))
    drive.fails(
        *("weights.commit_weights", 404, "unknown_id"),
        body=drive.body("CommitBody", request_id="x"),
    )
    drive.fails(
        *("prefill_gate.change_prefill_gate", 422, "refused_setting"),
        body=drive.body("GateBody", margin_quantile=2.0),
    )
    connected = drive.served.offer(NEW).connect().json()
    stale = drive.body("UpdateBody", plan_id=connected["plan_id"], version=0)
    drive.served.install(OLD)
    drive.fails("weights.update_weights", 409, "stale_version", body=stale)
    large = drive.body("UpdateBody", plan_id="x" * (2 << 20), version=1)
    problem = drive("weights.update_weights", "Problem", 413, body=large)
    assert problem.code == "body_too_large"


def test_every_route_answers_a_stranger_and_a_reader_in_type(drive: Driver) -> None:
    """401 without a right token, 403 without the scope, 503 where there is none at all."""
    drive.served.write_tokens("read", "control", "weights", more="read only-a-reader-of-state\n")
    bodies = {
        "weights.add_sources": drive.generated.types.File(payload=b"x"),
        "weights.connect_sources": drive.body("ConnectBody", source_ids=["x"]),
        "weights.update_weights": drive.body("UpdateBody", plan_id="x", version=1),
        "weights.prepare_weights": drive.body("UpdateBody", plan_id="x", version=1),
        "weights.commit_weights": drive.body("CommitBody", request_id="x"),
        "weights.abort_weights": drive.body("AbortBody", request_id="x"),
        "prefill_gate.change_prefill_gate": drive.body("GateBody"),
    }
    for operation in drive.generated.operations:
        fields = {"body": bodies[operation]} if operation in bodies else {}
        stranger = drive.with_token("nobody's", operation, "Problem", 401, **fields)
        assert (stranger.code, stranger.state) == ("unauthorized", None)
        if "get_" not in operation or operation == "weights.get_manifest":
            reader = "only-a-reader-of-state"
            assert drive.with_token(reader, operation, "Problem", 403, **fields).code == "forbidden"
    drive.served.write_tokens()
    assert drive("engine.get_state", "Problem", 503).code == "not_configured"
