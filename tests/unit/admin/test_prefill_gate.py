"""The gate's routes over a real gate: what is changed is in force, and what is wrong is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel

from engine_plugins.admin import schemas
from engine_plugins.admin.state import Fence, moved
from engine_plugins.prefill_gate import gate_report
from tests.support.admin_server import AdminServer
from tests.support.problems import problem

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]
ROUTE = "/prefill-gate"


async def told(server: AdminServer) -> dict[str, Any]:
    answer = await server.get(ROUTE)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize(
    ("view", "report"),
    [
        (schemas.GateView, gate_report.GateReport),
        (schemas.GateSettingsView, gate_report.GateSettings),
        (schemas.LineView, gate_report.LineReport),
        (schemas.MeasuredStepView, gate_report.MeasuredStep),
    ],
)
async def test_the_document_has_every_field_of_the_report(
    view: type[BaseModel], report: type[msgspec.Struct]
) -> None:
    """Neither more nor less than what is sent."""
    assert tuple(view.model_fields) == report.__struct_fields__


async def test_the_document_says_what_may_be_changed(make_server: MakeServer) -> None:
    """No field is required, none has a default, and no other is taken."""
    server = make_server()
    async with server.running():
        document = (await server.get("/openapi.json")).json()
    schema = document["components"]["schemas"]["GateBody"]
    changes = gate_report.GateChanges.__annotations__
    assert list(schema["properties"]) == list(changes)
    assert list(changes) == list(gate_report.GateSettings.__struct_fields__)
    assert "required" not in schema
    assert schema["additionalProperties"] is False
    assert not any("default" in each for each in schema["properties"].values())
    answer = document["paths"][ROUTE]["get"]["responses"]["200"]["content"]["application/json"]
    assert answer["schema"] == {"$ref": "#/components/schemas/GateView"}


async def test_a_change_is_in_force_and_leaves_the_rest(make_server: MakeServer) -> None:
    """One field, then another; null is a value of the cap's."""
    server = make_server()
    async with server.running():
        before = (await told(server))["settings"]
        assert before["mode"] == "off"
        for change in (
            {"mode": "observe"},
            {"margin_bytes": 5},
            {"margin_quantile": 1},
            {"cap_bytes": 1 << 30},
            {"cap_bytes": None, "mode": "enforce"},
            {},
        ):
            before |= change
            answer = await server.http.patch(ROUTE, json=change)
            assert answer.status_code == 200, answer.text
            assert answer.json()["settings"] == (await told(server))["settings"] == before


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"mode": "on"}, "'on'"),
        ({"mode": ""}, "PREFILL_GATE"),
        ({"cap_bytes": 0}, "PREFILL_CAP_BYTES"),
        ({"cap_bytes": -1}, "PREFILL_CAP_BYTES"),
        ({"cap_bytes": 1 << 52}, "memory"),
        ({"margin_quantile": 0}, "PREFILL_MARGIN_QUANTILE"),
        ({"margin_quantile": 1.01}, "PREFILL_MARGIN_QUANTILE"),
        ({"margin_bytes": -1}, "PREFILL_MARGIN_BYTES"),
        ({"mode": "enforce", "margin_bytes": -1}, "PREFILL_MARGIN_BYTES"),
    ],
)
async def test_a_value_that_makes_no_sense_changes_nothing(
    make_server: MakeServer, change: dict[str, Any], seen: str
) -> None:
    """422, with the setting's own words; also where another field was right."""
    server = make_server()
    async with server.running():
        before = await told(server)
        answer = await server.http.patch(ROUTE, json=change)
        assert seen in problem(answer, 422, "refused_setting")
        assert await told(server) == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"modus": "off"}',
        b'{"mode": null}',
        b'{"mode": 1}',
        b'{"cap_bytes": "1"}',
        b'{"cap_bytes": true}',
        b'{"cap_bytes": 1e30}',
        b'{"cap_bytes": 100000000000000000000}',
        b'{"margin_bytes": 1.5}',
        b'{"margin_bytes": null}',
        b'{"margin_bytes": -100000000000000000000}',
        b'{"margin_quantile": NaN}',
        b'{"margin_quantile": "0.9"}',
    ],
)
async def test_a_body_that_is_no_change_is_malformed(make_server: MakeServer, body: bytes) -> None:
    """400, as on every route."""
    server = make_server()
    async with server.running():
        before = await told(server)
        answer = await server.http.patch(ROUTE, content=body)
        problem(answer, 400, "malformed_request")
        assert await told(server) == before


async def test_a_reset_counts_from_0_and_keeps_the_settings(make_server: MakeServer) -> None:
    """Requests before it are forgotten, those after it are counted."""
    server = make_server()
    async with server.running():
        await server.http.patch(ROUTE, json={"mode": "observe"})
        await server.engine.answer(1, 2, 3)
        assert (await told(server))["decisions"]["run"] == 1
        empty = await server.post(ROUTE + "/reset")
        assert sum(empty.json()["decisions"].values()) == 0
        assert empty.json()["settings"]["mode"] == "observe"
        await server.engine.answer(4, 5, 6)
        assert (await told(server))["decisions"]["run"] == 1


@pytest.mark.parametrize("state", ["paused", "asleep", "fenced"])
async def test_the_gate_answers_whatever_state_the_engine_is_in(
    make_server: MakeServer, state: Any
) -> None:
    """It is the scheduler's, which lives; nothing of the engine's state changes."""
    server = make_server()
    fence = Fence(code="peer_lost", detail="half", remedy="repeat", attempted_version=5)
    async with server.running():
        server.shared.change(
            lambda now: moved(now, state, fence=fence if state == "fenced" else None)
        )
        before = server.shared.read()
        answer = await server.http.patch(ROUTE, json={"mode": "observe"})
        assert answer.json()["settings"]["mode"] == "observe"
        assert (await server.post(ROUTE + "/reset")).status_code == 200
        assert server.shared.read() == before


async def test_both_api_processes_ask_the_same_gate(make_server: MakeServer) -> None:
    """What one changes, the other tells."""
    one = make_server()
    other = make_server(engine=one.engine)
    async with one.running(), other.http:
        await one.http.patch(ROUTE, json={"margin_bytes": 77})
        assert (await told(other))["settings"]["margin_bytes"] == 77
