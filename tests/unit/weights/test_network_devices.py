"""What becomes of UCX_NET_DEVICES before an agent is made."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine_plugins import engine_rank
from engine_plugins.errors import SettingsError, TransportError, UnsupportedError
from engine_plugins.sender import offer
from engine_plugins.weights.network_devices import current_gpu, prepare_network
from tests.support.sysfs import ACTIVE, DOWN, Machine

GPUS = ["0000:13:00.0", "0000:23:00.0"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Two GPUs, each with a NIC behind its switch; a third NIC is down."""
    made = Machine(root=tmp_path)
    for number, address in enumerate(GPUS, start=1):
        bridges = (f"pci0000:{number}0", f"0000:{number}0:01.0")
        made.gpu(address, *bridges)
        made.nic(f"mlx5_{number}", f"0000:{number}4:00.0", *bridges, states=(ACTIVE,))
    made.nic("mlx5_7", "0000:74:00.0", "pci0000:70", states=(DOWN,))
    made.interface("lo", "unknown")
    made.interface("eth0")
    made.interface("eth1", "down")
    return made


def prepare(
    machine: Machine, device_index: int | None, environ: dict[str, str], **more: str
) -> str | None:
    return prepare_network(
        device_index,
        environ,
        sysfs=machine.sysfs,
        dev=machine.dev,
        pci_address=GPUS.__getitem__,
        **more,
    )


def test_each_device_gets_its_own_port(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """Quietly, and again without a change."""
    for index in range(2):
        environ: dict[str, str] = {}
        for _ in range(2):
            assert prepare(machine, index, environ) == f"mlx5_{index + 1}:1"
            assert environ == {"UCX_NET_DEVICES": f"mlx5_{index + 1}:1"}
    assert caplog.records == []


@pytest.mark.parametrize("inherited", ["all", "mlx5_1:1", "mlx5_7:1", "lo"])
def test_an_inherited_value_is_overridden_and_said(
    machine: Machine, caplog: pytest.LogCaptureFixture, inherited: str
) -> None:
    environ = {"UCX_NET_DEVICES": inherited}
    with caplog.at_level(logging.WARNING):
        assert prepare(machine, 1, environ) == "mlx5_2:1"
    (record,) = caplog.records
    text = record.getMessage()
    for part in (f"UCX_NET_DEVICES={inherited} ", "GPU 1 (0000:23:00.0)", "mlx5_2:1", "inherit"):
        assert part in text
    assert environ["UCX_NET_DEVICES"] == "mlx5_2:1"


def test_without_rdma_devices_the_environment_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So tests on loopback stay on loopback, on a machine with GPUs too."""
    machine = Machine(root=tmp_path)
    machine.gpu(GPUS[0], "pci0000:10")
    environ = {"UCX_NET_DEVICES": "lo"}
    assert prepare(machine, 0, environ) == "lo"
    assert environ == {"UCX_NET_DEVICES": "lo"}
    assert prepare(machine, 0, {}) is None
    assert caplog.records == []


def test_without_a_gpu_the_environment_is_left_alone(machine: Machine) -> None:
    environ = {"UCX_NET_DEVICES": "eth0"}
    assert prepare(machine, None, environ) == "eth0"
    assert prepare(machine, None, {}) is None
    assert environ == {"UCX_NET_DEVICES": "eth0"}


@pytest.mark.parametrize(
    "value", ["mlx5_2:1", "mlx5_1:1,mlx5_2:1", "eth0", "lo", "all", "^mlx5_9:1"]
)
def test_the_operators_word_holds(machine: Machine, value: str) -> None:
    """From the environment or from an engine's configuration, with and without a GPU."""
    environ = {"UCX_NET_DEVICES": "mlx5_1:1", "ENGINE_PLUGINS_NET_DEVICES": value}
    assert prepare(machine, 0, environ) == value
    assert environ["UCX_NET_DEVICES"] == value
    environ = {"ENGINE_PLUGINS_NET_DEVICES": "eth0"}
    assert prepare(machine, None, environ, net_devices=value) == value
    assert environ["UCX_NET_DEVICES"] == value


def test_inherit_keeps_what_is_there(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    for environ in ({"UCX_NET_DEVICES": "mlx5_2:1"}, {}):
        environ["ENGINE_PLUGINS_NET_DEVICES"] = "inherit"
        before = dict(environ)
        assert prepare(machine, 0, environ) == before.get("UCX_NET_DEVICES")
        assert environ == before
    assert caplog.records == []


@pytest.mark.parametrize(
    ("value", "said"),
    [("mlx5_7:1", r"mlx5_7:1 is down \(DOWN, Disabled\)"), ("lo, eth1", "eth1 is down")],
)
def test_a_named_port_that_is_down_is_refused(machine: Machine, value: str, said: str) -> None:
    environ = {"UCX_NET_DEVICES": "lo", "ENGINE_PLUGINS_NET_DEVICES": value}
    with pytest.raises(TransportError, match=f"ENGINE_PLUGINS_NET_DEVICES: .*{said}"):
        prepare(machine, 0, environ)
    assert environ["UCX_NET_DEVICES"] == "lo"
    environ = {"UCX_NET_DEVICES": value, "ENGINE_PLUGINS_NET_DEVICES": "inherit"}
    with pytest.raises(TransportError, match=f"keeps UCX_NET_DEVICES: .*{said}"):
        prepare(machine, 0, environ)


@pytest.mark.parametrize("value", ["mlx5_2", "mlx5_9:1", "eth7", "mlx5_1:1,mlx5_1:2"])
def test_a_name_that_is_not_here_is_refused_with_those_that_are(
    machine: Machine, value: str
) -> None:
    """A device without its port too: UCX would take it for a name that nothing has."""
    with pytest.raises(SettingsError, match=r"there are: mlx5_1:1, mlx5_2:1, mlx5_7:1, eth0"):
        prepare(machine, 0, {"ENGINE_PLUGINS_NET_DEVICES": value})


def test_the_nearest_port_down_is_refused_and_nothing_is_set(machine: Machine) -> None:
    state = machine.sysfs / "class/infiniband/mlx5_2/ports/1/state"
    state.write_text("2: INIT\n")
    environ = {"UCX_NET_DEVICES": "all"}
    with pytest.raises(TransportError, match=r"mlx5_2:1 \(INIT, LinkUp\)"):
        prepare(machine, 1, environ)
    assert environ == {"UCX_NET_DEVICES": "all"}
    assert prepare(machine, 0, environ) == "mlx5_1:1"


def test_a_device_that_cuda_does_not_have_is_an_error(machine: Machine) -> None:
    """Here: a torch without CUDA, asked for a GPU on a machine with RDMA devices."""
    with pytest.raises(UnsupportedError, match="CUDA"):
        prepare_network(99, {}, sysfs=machine.sysfs, dev=machine.dev)


def test_a_process_that_computes_on_the_cpu_has_no_gpu() -> None:
    """Asking must not take memory on one, on a machine that has some."""
    assert current_gpu() is None


def test_both_ends_ask_before_they_make_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with its engine's setting, a trainer with its environment's."""
    with pytest.raises(SettingsError, match="nosuch0:1"):
        engine_rank._nixl_transport(0, "nosuch0:1")
    monkeypatch.setenv("ENGINE_PLUGINS_NET_DEVICES", "nosuch1:1")
    with pytest.raises(SettingsError, match="nosuch1:1"):
        offer._nixl()
