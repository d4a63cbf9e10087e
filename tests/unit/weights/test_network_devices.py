"""What UCX_NET_DEVICES shall be for an agent that is about to be made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine_plugins.errors import SettingsError, TransportError, UnsupportedError
from engine_plugins.weights.hardware.network_devices import choose_devices, current_gpu
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


def choose(
    machine: Machine,
    device_index: int | None,
    environ: dict[str, str],
    net_devices: str | None = None,
    interfaces: Sequence[str] = (),
) -> str | None:
    return choose_devices(
        device_index,
        environ,
        sysfs=machine.sysfs,
        dev=machine.dev,
        pci_address=GPUS.__getitem__,
        net_devices=net_devices,
        interfaces=interfaces,
    )


def test_each_device_gets_its_own_port(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """Quietly, whatever the network is that the process is reached over."""
    for index in range(2):
        for interfaces in ([], ["eth0"]):
            found = choose(machine, index, {}, interfaces=interfaces)
            assert found == f"mlx5_{index + 1}:1"
    assert caplog.records == []


@pytest.mark.parametrize("inherited", ["all", "mlx5_1:1", "mlx5_7:1", "lo"])
def test_an_inherited_value_is_overridden_and_said(
    machine: Machine, caplog: pytest.LogCaptureFixture, inherited: str
) -> None:
    environ = {"UCX_NET_DEVICES": inherited}
    with caplog.at_level(logging.WARNING):
        assert choose(machine, 1, environ) == "mlx5_2:1"
    (record,) = caplog.records
    text = record.getMessage()
    for part in (f"UCX_NET_DEVICES={inherited} ", "GPU 1 (0000:23:00.0)", "mlx5_2:1", "inherit"):
        assert part in text


@pytest.mark.parametrize("gpu", [0, None])
def test_without_rdma_devices_it_is_the_interface_that_leads_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gpu: int | None
) -> None:
    """Not every one: UCX asks nobody who connects for a token. UCX's own setting holds."""
    machine = Machine(root=tmp_path)
    machine.gpu(GPUS[0], "pci0000:10")
    assert choose(machine, gpu, {}, interfaces=["eth0"]) == "eth0"
    assert choose(machine, gpu, {}, interfaces=["eth0", "lo"]) == "eth0,lo"
    assert choose(machine, gpu, {"UCX_NET_DEVICES": "eth1"}, interfaces=["eth0"]) == "eth1"
    assert caplog.records == []


def test_without_a_gpu_rdma_ports_that_are_up_come_on_top(machine: Machine) -> None:
    """They open no TCP port, and a trainer on the CPU is to keep them."""
    assert choose(machine, None, {}, interfaces=["eth0"]) == "eth0,mlx5_1:1,mlx5_2:1"
    assert choose(machine, None, {"UCX_NET_DEVICES": "lo"}, interfaces=["eth0"]) == "lo"


def test_where_nobody_knows_the_network_ucx_chooses_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose(Machine(root=tmp_path), None, {}) is None
    (record,) = caplog.records
    assert "listens on every one" in record.getMessage()
    assert "ENGINE_PLUGINS_NET_DEVICES" in record.getMessage()


@pytest.mark.parametrize(
    "value", ["mlx5_2:1", "mlx5_1:1,mlx5_2:1", "eth0", "lo", "all", "^mlx5_9:1"]
)
def test_the_operators_word_holds(machine: Machine, value: str) -> None:
    """From the environment or from an engine's configuration, with and without a GPU."""
    environ = {"UCX_NET_DEVICES": "mlx5_1:1", "ENGINE_PLUGINS_NET_DEVICES": value}
    assert choose(machine, 0, environ, interfaces=["eth0"]) == value
    environ = {"ENGINE_PLUGINS_NET_DEVICES": "eth0"}
    assert choose(machine, None, environ, net_devices=value) == value


def test_inherit_keeps_what_is_there(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    for environ in ({"UCX_NET_DEVICES": "mlx5_2:1"}, {}):
        environ["ENGINE_PLUGINS_NET_DEVICES"] = "inherit"
        assert choose(machine, 0, environ) == environ.get("UCX_NET_DEVICES")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("value", "said"),
    [("mlx5_7:1", r"mlx5_7:1 is down \(DOWN, Disabled\)"), ("lo, eth1", "eth1 is down")],
)
def test_a_named_port_that_is_down_is_refused(machine: Machine, value: str, said: str) -> None:
    environ = {"UCX_NET_DEVICES": "lo", "ENGINE_PLUGINS_NET_DEVICES": value}
    with pytest.raises(TransportError, match=f"ENGINE_PLUGINS_NET_DEVICES: .*{said}"):
        choose(machine, 0, environ)
    environ = {"UCX_NET_DEVICES": value, "ENGINE_PLUGINS_NET_DEVICES": "inherit"}
    with pytest.raises(TransportError, match=f"keeps UCX_NET_DEVICES: .*{said}"):
        choose(machine, 0, environ)


@pytest.mark.parametrize("value", ["mlx5_2", "mlx5_9:1", "eth7", "mlx5_1:1,mlx5_1:2"])
def test_a_name_that_is_not_here_is_refused_with_those_that_are(
    machine: Machine, value: str
) -> None:
    """A device without its port too: UCX would take it for a name that nothing has."""
    with pytest.raises(SettingsError, match=r"there are: mlx5_1:1, mlx5_2:1, mlx5_7:1, eth0"):
        choose(machine, 0, {"ENGINE_PLUGINS_NET_DEVICES": value})


def test_the_nearest_port_down_is_refused(machine: Machine) -> None:
    state = machine.sysfs / "class/infiniband/mlx5_2/ports/1/state"
    state.write_text("2: INIT\n")
    environ = {"UCX_NET_DEVICES": "all"}
    with pytest.raises(TransportError, match=r"mlx5_2:1 \(INIT, LinkUp\)"):
        choose(machine, 1, environ)
    assert choose(machine, 0, environ) == "mlx5_1:1"


def test_a_device_that_cuda_does_not_have_is_an_error(machine: Machine) -> None:
    """Here: a torch without CUDA, asked for a GPU on a machine with RDMA devices."""
    with pytest.raises(UnsupportedError, match="CUDA"):
        choose_devices(99, {}, sysfs=machine.sysfs, dev=machine.dev)


def test_a_process_that_computes_on_the_cpu_has_no_gpu() -> None:
    """Asking must not take memory on one, on a machine that has some."""
    assert current_gpu() is None
