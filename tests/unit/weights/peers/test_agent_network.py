"""Agents listen where their process is reached, and nowhere else. Real agents, real sockets."""

from __future__ import annotations

import os
import socket
from contextlib import closing

import psutil
import pytest

from engine_plugins.errors import SettingsError
from engine_plugins.weights.peers.agent_network import (
    AgentNetwork,
    interface_of,
    own_addresses_towards,
)


@pytest.fixture(autouse=True)
def without_an_operators_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UCX_NET_DEVICES", "ENGINE_PLUGINS_NET_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def outside() -> tuple[str, str]:
    """An address of this machine beyond loopback, and its interface."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return each.address, name
    pytest.skip("this machine has loopback alone")


def listening() -> set[str]:
    """Addresses that this process accepts TCP connections at."""
    mine = psutil.Process().net_connections(kind="tcp")
    return {each.laddr.ip for each in mine if each.status == psutil.CONN_LISTEN}


def test_an_agent_reached_over_loopback_listens_on_loopback_alone() -> None:
    before = listening()
    network = AgentNetwork()
    assert not network.reach("localhost")
    with closing(network.open(f"loopback-{os.getpid()}")):
        assert listening() - before <= {"127.0.0.1", "::1"}
        assert listening() & {"127.0.0.1", "::1"}, "it does listen"
    assert "UCX_NET_DEVICES" not in os.environ, "processes that are started later inherit it"


def test_without_a_network_to_choose_ucx_listens_on_every_one(outside: tuple[str, str]) -> None:
    """So the test above can fail."""
    with closing(AgentNetwork().open(f"anywhere-{os.getpid()}")):
        assert {"127.0.0.1", outside[0]} <= listening()


def test_an_agent_is_outgrown_by_a_caller_from_another_network(outside: tuple[str, str]) -> None:
    address, name = outside
    network = AgentNetwork()
    network.reach("127.0.0.1")
    with closing(network.open(f"first-{os.getpid()}")):
        assert not network.reach("127.0.0.2")
        assert address not in listening()
        assert network.reach(address)
    with closing(network.open(f"second-{os.getpid()}")):
        assert not network.reach(address)
        assert {"127.0.0.1", address} <= listening()
    assert interface_of(address) == name


def test_the_operators_word_comes_before_any_address(outside: tuple[str, str]) -> None:
    network = AgentNetwork("lo")
    network.reach("127.0.0.1")
    with closing(network.open(f"told-{os.getpid()}")):
        assert not network.reach(outside[0]), "nothing else would be chosen"
        assert outside[0] not in listening()
    with pytest.raises(SettingsError, match="nosuch0:1"):
        AgentNetwork("nosuch0:1").open("none")


def test_towards_an_address_of_ones_own_it_is_that_address(outside: tuple[str, str]) -> None:
    assert own_addresses_towards("127.0.0.1") == {"127.0.0.1"}
    assert own_addresses_towards(outside[0]) == {outside[0]}
    assert own_addresses_towards("no-such-host.invalid") == set()


def test_a_name_that_could_not_be_resolved_is_looked_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = AgentNetwork("lo")
    found: list[str] = []
    real = socket.getaddrinfo

    def look(host: str, *args: object, **more: object) -> object:
        found.append(host)
        if len(found) == 1:
            raise socket.gaierror("no such name yet")
        return real("127.0.0.1", *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look)
    for _ in range(3):
        network.reach("engine-7")
    assert len(found) == 2


@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("127.0.0.1", "lo"),
        ("127.9.9.9", "lo"),
        ("::ffff:127.0.0.1", "lo"),
        ("203.0.113.9", None),
        ("testserver", None),
    ],
)
def test_interfaces_by_address(address: str, interface: str | None) -> None:
    assert interface_of(address) == interface
