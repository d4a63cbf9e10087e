"""Who could reach an engine's memory: where its agents listen, and what routes say of them."""

from __future__ import annotations

import ipaddress

import psutil

from engine_plugins.admin.routes import SCOPES
from tests.support.configurations import DENSE, OLD, on
from tests.support.served import Served

pytestmark = on(DENSE)

KEY = "bml4bFNlckRlc3"
"""How all of NIXL's metadata begins, in base64."""


def test_agents_listen_where_the_server_is_reached_and_nowhere_else(served: Served) -> None:
    """The server's own address is on loopback; UCX by default takes every interface.

    UCX's listeners bear the address of their interface, others of an engine may bear none.
    """
    served.install(OLD)
    found: set[str] = set()
    for worker in served.server.state()["workers"]:
        for each in psutil.Process(worker["pid"]).net_connections(kind="tcp"):
            if each.status == psutil.CONN_LISTEN:
                found.add(each.laddr.ip)
    here = {each for each in found if ipaddress.ip_address(each).is_loopback}
    assert here, "an agent listens on loopback"
    assert found - here <= {"0.0.0.0", "::"}, found


def test_metadata_leaves_by_no_route_below_the_weights_scope(served: Served) -> None:
    """It is the key to a process's memory: the trainer's came in, the engine's was just told."""
    admin, offer = served.server.admin, served.offer(OLD)
    told = offer.connect(direction="push")
    assert KEY in told.text, "a push has to say where to write"
    served.install(OLD)
    bodies = {"a pull's plan": offer.connect().text, "an unknown route": admin.get("/nowhere").text}
    for (method, path), scope in SCOPES.items():
        if scope != "weights":
            # A body that no route takes: these are asked for their errors, not to act.
            bodies[path] = admin.request(method, path, json=None if method == "GET" else [1]).text
    assert len(bodies) > 8
    for where, text in bodies.items():
        assert KEY not in text, where
        assert "nixlSerDes" not in text, where
