"""Which ports a GPU gets, on the shapes of machine that clusters have."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine_plugins.errors import TransportError
from engine_plugins.weights.hardware.nic_locality import Nearness, nearness, ports_of_gpu
from engine_plugins.weights.hardware.rdma_ports import PciPlace, gpu_places, read_ports
from tests.support.sysfs import ACTIVE, DOWN, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(root=tmp_path)


def chosen(machine: Machine) -> list[list[str]]:
    """Ports of every GPU, in the order of their bus addresses."""
    gpus = gpu_places(machine.sysfs)
    ports = read_ports(machine.sysfs, machine.dev)
    return [[port.name for port in ports_of_gpu(gpu, gpus, ports)] for gpu in sorted(gpus)]


def build_dgx(machine: Machine, *, down: int | None = None) -> None:
    """8 GPUs and 8 NICs in pairs, each behind a switch of its own; names not in bus order."""
    for slot in range(8):
        bus = 0x10 + 0x18 * slot
        bridges = (f"pci0000:{bus:02x}", f"0000:{bus:02x}:01.0", f"0000:{bus + 1:02x}:00.0")
        machine.gpu(f"0000:{bus + 3:02x}:00.0", *bridges, numa=slot // 4)
        machine.nic(
            f"mlx5_{(slot + 5) % 8}",
            f"0000:{bus + 4:02x}:00.0",
            *bridges,
            numa=slot // 4,
            states=(DOWN if slot == down else ACTIVE,),
        )
    machine.nic("mlx5_8", "0000:0b:00.0", "pci0000:0a", numa=0, rate="25 Gb/sec (1X EDR)")


def test_each_gpu_of_a_dgx_gets_the_nic_behind_its_own_switch(machine: Machine) -> None:
    """Not the management card, which no GPU shares a switch with."""
    build_dgx(machine)
    assert chosen(machine) == [[f"mlx5_{(slot + 5) % 8}:1"] for slot in range(8)]


def test_a_gpu_whose_own_nic_is_down_is_refused_and_the_others_are_served(machine: Machine) -> None:
    build_dgx(machine, down=3)
    gpus = gpu_places(machine.sysfs)
    ports = read_ports(machine.sysfs, machine.dev)
    addresses = sorted(gpus)
    with pytest.raises(TransportError, match=r"0000:5b:00.0.*mlx5_0:1 \(DOWN, Disabled\)") as info:
        ports_of_gpu(addresses[3], gpus, ports)
    assert "ENGINE_PLUGINS_NET_DEVICES" in info.value.remedy
    for slot in (0, 1, 2, 4, 5, 6, 7):
        (port,) = ports_of_gpu(addresses[slot], gpus, ports)
        assert port.device == f"mlx5_{(slot + 5) % 8}"


def test_two_nics_for_each_gpu_are_both_its_own(machine: Machine) -> None:
    for slot in range(4):
        bridges = (f"pci0000:{slot}0", f"0000:{slot}0:01.0")
        machine.gpu(f"0000:{slot}3:00.0", *bridges)
        machine.nic(f"mlx5_{2 * slot}", f"0000:{slot}4:00.0", *bridges)
        machine.nic(f"mlx5_{2 * slot + 1}", f"0000:{slot}4:00.1", *bridges)
    assert chosen(machine) == [
        [f"mlx5_{2 * slot}:1", f"mlx5_{2 * slot + 1}:1"] for slot in (0, 1, 2, 3)
    ]


def test_one_of_three_near_ports_down_is_left_out_with_a_warning(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a public cluster, where that port got a GPU's traffic and its connections broke."""
    bridges = ("pci0000:10", "0000:10:01.0")
    machine.gpu("0000:13:00.0", *bridges)
    for number, state in enumerate((ACTIVE, DOWN, ACTIVE)):
        machine.nic(f"mlx5_{number}", f"0000:14:00.{number}", *bridges, states=(state,))
    with caplog.at_level(logging.WARNING):
        assert chosen(machine) == [["mlx5_0:1", "mlx5_2:1"]]
    assert "mlx5_1:1 (DOWN, Disabled)" in caplog.text


def test_gpus_that_share_a_switch_deal_its_nics_out(machine: Machine) -> None:
    """Two GPUs and two NICs behind one switch: one each, not both on both."""
    bridges = ("pci0000:10", "0000:10:01.0")
    for number in range(2):
        machine.gpu(f"0000:13:0{number}.0", *bridges)
        machine.nic(f"mlx5_{number}", f"0000:14:0{number}.0", *bridges)
    assert chosen(machine) == [["mlx5_0:1"], ["mlx5_1:1"]]


def test_fewer_nics_than_gpus_are_shared_evenly(machine: Machine) -> None:
    for number in range(8):
        machine.gpu(f"0000:{number}3:00.0", f"pci0000:{number}0", numa=number // 4)
    for number in range(4):
        machine.nic(
            f"mlx5_{number}", f"0000:a{number}:00.0", f"pci0000:a{number}", numa=number // 2
        )
    assert chosen(machine) == [[f"mlx5_{number // 2}:1"] for number in range(8)]


def test_within_a_cascade_of_switches_the_nearer_one_wins(machine: Machine) -> None:
    """All below one root port, in two lower switches."""
    top = ("pci0000:10", "0000:10:01.0", "0000:11:00.0")
    for number in range(2):
        lower = (*top, f"0000:12:0{number}.0", f"0000:2{number}:00.0")
        machine.gpu(f"0000:3{number}:00.0", *lower)
        machine.nic(f"mlx5_{number}", f"0000:4{1 - number}:00.0", *lower)
    assert chosen(machine) == [["mlx5_0:1"], ["mlx5_1:1"]]


def test_numa_decides_where_no_bridge_is_shared(machine: Machine) -> None:
    machine.gpu("0000:13:00.0", "pci0000:10", numa=1)
    machine.nic("mlx5_0", "0000:24:00.0", "pci0000:20", numa=0)
    machine.nic("mlx5_1", "0000:34:00.0", "pci0000:30", numa=1)
    assert chosen(machine) == [["mlx5_1:1"]]


def test_a_virtual_machine_that_tells_nothing_deals_ports_in_bus_order(machine: Machine) -> None:
    """Every device on one flat bus, or on a bus of its own; and no NUMA nodes."""
    for number in range(4):
        machine.gpu(f"0000:00:0{number}.0", "pci0000:00")
        machine.nic(f"mlx5_{number}", f"000{number + 1}:00:02.0", f"pci000{number + 1}:00")
    assert chosen(machine) == [[f"mlx5_{number}:1"] for number in range(4)]


def test_a_slow_port_for_management_gets_no_traffic(machine: Machine) -> None:
    """It is the nearest by NUMA node, as an accelerated network card of a cloud machine is."""
    machine.gpu("0000:13:00.0", "pci0000:10", numa=0)
    machine.nic(
        "mlx5_an0",
        "0000:24:00.0",
        "pci0000:20",
        numa=0,
        rate="100 Gb/sec (4X EDR)",
        link_layer="Ethernet",
    )
    machine.nic("mlx5_ib0", "0000:34:00.0", "pci0000:30", numa=1)
    assert chosen(machine) == [["mlx5_ib0:1"]]


def test_roce_ports_count_like_infiniband_ports(machine: Machine) -> None:
    machine.gpu("0000:13:00.0", "pci0000:10", "0000:10:01.0")
    machine.nic("mlx5_bond_0", "0000:14:00.0", "pci0000:10", "0000:10:01.0", link_layer="Ethernet")
    machine.nic("mlx5_1", "0000:34:00.0", "pci0000:30")
    assert chosen(machine) == [["mlx5_bond_0:1"]]


def test_the_second_port_of_a_card_is_a_port(machine: Machine) -> None:
    machine.gpu("0000:13:00.0", "pci0000:10", "0000:10:01.0")
    machine.nic("mlx5_0", "0000:14:00.0", "pci0000:10", "0000:10:01.0", states=(DOWN, ACTIVE))
    assert chosen(machine) == [["mlx5_0:2"]]


def test_a_gpu_that_sysfs_does_not_show_is_near_to_nothing(machine: Machine) -> None:
    machine.nic("mlx5_0", "0000:14:00.0", "pci0000:10")
    ports = read_ports(machine.sysfs, machine.dev)
    assert ports_of_gpu("0000:13:00.0", {}, ports) == ports


def test_nearness_orders_what_devices_share() -> None:
    gpu = PciPlace(path=("pci0000:10", "0000:10:01.0", "0000:13:00.0"), numa=0)
    behind_the_switch = PciPlace(path=("pci0000:10", "0000:10:01.0", "0000:14:00.0"), numa=0)
    same_host_bridge = PciPlace(path=("pci0000:10", "0000:10:02.0", "0000:15:00.0"), numa=0)
    same_node = PciPlace(path=("pci0000:20", "0000:21:00.0"), numa=0)
    other_node = PciPlace(path=("pci0000:30", "0000:31:00.0"), numa=1)
    others = [behind_the_switch, same_host_bridge, same_node, other_node]
    assert [nearness(gpu, other)[0] for other in others] == list(Nearness)
    assert nearness(gpu, None) == nearness(gpu, other_node)
    nowhere = PciPlace(path=("pci0000:40", "0000:41:00.0"), numa=-1)
    assert nearness(nowhere, PciPlace(path=("pci0000:50",), numa=-1))[0] is Nearness.NOTHING
