"""What sysfs says, on trees laid out as the kernel does; and on this machine, whatever it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_plugins.weights.hardware.rdma_ports import (
    PciPlace,
    gpu_places,
    network_interfaces,
    read_ports,
)
from tests.support.sysfs import ACTIVE, DOWN, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(root=tmp_path)


def test_a_port_is_read_with_its_place_rate_and_condition(machine: Machine) -> None:
    machine.nic(
        "mlx5_0", "0000:1a:00.0", "pci0000:15", "0000:15:01.0", numa=1, states=(ACTIVE, DOWN)
    )
    up, down = read_ports(machine.sysfs, machine.dev)
    assert (up.name, up.condition, up.rate_gbps, up.is_up) == (
        "mlx5_0:1",
        "ACTIVE, LinkUp",
        400.0,
        True,
    )
    assert up.place == PciPlace(path=("pci0000:15", "0000:15:01.0", "0000:1a:00.0"), numa=1)
    assert (down.name, down.condition, down.is_up) == ("mlx5_0:2", "DOWN, Disabled", False)


@pytest.mark.parametrize(
    ("state", "phys_state"),
    [("4: ACTIVE", "2: Polling"), ("2: INIT", "5: LinkUp"), ("3: ARMED", "5: LinkUp"), ("", "")],
)
def test_only_a_trained_and_admitted_port_is_up(
    machine: Machine, state: str, phys_state: str
) -> None:
    """INIT: no subnet manager has taken the port in."""
    machine.nic("mlx5_0", "0000:1a:00.0", "pci0000:15")
    port = machine.sysfs / "class/infiniband/mlx5_0/ports/1"
    (port / "state").write_text(state)
    (port / "phys_state").write_text(phys_state)
    assert not read_ports(machine.sysfs, machine.dev)[0].is_up


def test_ports_come_in_bus_order_not_by_name(machine: Machine) -> None:
    machine.nic("mlx5_0", "0000:9a:00.0", "pci0000:95")
    machine.nic("mlx5_10", "0000:1a:00.0", "pci0000:15")
    machine.nic("mlx5_2", "", states=(ACTIVE,))
    machine.nic("mlx5_11", "", states=(ACTIVE,))
    names = [port.device for port in read_ports(machine.sysfs, machine.dev)]
    assert names == ["mlx5_2", "mlx5_11", "mlx5_10", "mlx5_0"]


def test_a_container_opens_only_what_it_was_given(machine: Machine) -> None:
    """Sysfs shows the whole machine to everybody."""
    machine.nic("mlx5_0", "0000:1a:00.0", "pci0000:15", in_container=False)
    machine.nic("mlx5_1", "0000:3c:00.0", "pci0000:37")
    assert [port.name for port in read_ports(machine.sysfs, machine.dev)] == ["mlx5_1:1"]


def test_what_ucx_does_not_drive_through_verbs_is_none(machine: Machine) -> None:
    """iWARP, and Amazon's EFA, which NIXL reaches through another backend."""
    machine.nic("irdma0", "0000:1a:00.0", "pci0000:15", node_type="4: RNIC")
    machine.nic("rdmap0", "0000:1b:00.0", "pci0000:15", node_type="7: unspecified")
    assert read_ports(machine.sysfs, machine.dev) == []


def test_files_that_are_absent_or_odd_make_unknowns_not_crashes(machine: Machine) -> None:
    machine.nic("mlx5_0", "0000:1a:00.0", "pci0000:15")
    port = machine.sysfs / "class/infiniband/mlx5_0/ports/1"
    (port / "rate").write_text("unknown\n")
    for name in ("state", "phys_state"):
        (port / name).unlink()
    (machine.sysfs / "bus/pci/devices/0000:1a:00.0/numa_node").write_text("?\n")
    (read,) = read_ports(machine.sysfs, machine.dev)
    assert (read.condition, read.rate_gbps, read.is_up) == ("unknown, unknown", 0.0, False)
    assert read.place is not None
    assert read.place.numa == -1


def test_gpus_are_told_from_other_devices(machine: Machine) -> None:
    """By PCI class and vendor: a display adapter on the board of a server is no GPU for us."""
    machine.gpu("0000:18:00.0", "pci0000:15", "0000:15:01.0", numa=0)
    machine.gpu("0000:03:00.0", "pci0000:00", vendor="0x1a03")
    machine.nic("mlx5_0", "0000:1a:00.0", "pci0000:15")
    places = gpu_places(machine.sysfs)
    assert places == {
        "0000:18:00.0": PciPlace(path=("pci0000:15", "0000:15:01.0", "0000:18:00.0"), numa=0)
    }


def test_a_device_without_a_host_bridge_has_no_place(machine: Machine) -> None:
    machine.gpu("0000:18:00.0", "platform")
    assert gpu_places(machine.sysfs) == {"0000:18:00.0": None}


def test_no_sysfs_at_all_is_a_machine_without_devices(tmp_path: Path) -> None:
    assert read_ports(tmp_path / "sys", tmp_path / "dev") == []
    assert gpu_places(tmp_path / "sys") == {}
    assert network_interfaces(tmp_path / "sys") == {}


def test_this_machine_can_be_read() -> None:
    """The real sysfs, wherever tests run: it has loopback."""
    assert "lo" in network_interfaces()
    assert all(port.device and port.port > 0 for port in read_ports())
    assert all(address.count(":") == 2 for address in gpu_places())
