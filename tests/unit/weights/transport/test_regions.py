"""Range checks: vectorized over descriptors, and equal to the obvious loop."""

from __future__ import annotations

import numpy as np
import pytest

from engine_plugins.errors import PeerError
from engine_plugins.weights.transport.regions import HOST, RegionTable


def inside(regions: list[tuple[int, int, int]], address: int, nbytes: int, device: int) -> bool:
    """The rule itself: some one region of the device holds the whole range."""
    return any(
        on == device and start <= address and address + nbytes <= start + size
        for start, size, on in regions
    )


def test_ranges_are_judged_as_the_plain_rule_judges_them() -> None:
    """Neighbouring regions do not merge, and a region of another device does not count."""
    regions = [(100, 50, HOST), (150, 10, HOST), (200, 1, HOST), (300, 40, 0)]
    table = RegionTable()
    for region in regions:
        table.add(*region)
    random = np.random.default_rng(0)
    judged = {True: 0, False: 0}
    for _ in range(3000):
        address, nbytes = int(random.integers(90, 350)), int(random.integers(1, 30))
        device = int(random.integers(-1, 2))
        expected = inside(regions, address, nbytes, device)
        judged[expected] += 1
        row = np.array([[100 if device else 300, 1], [address, nbytes]], dtype=np.uint64)
        if device == 1 or not expected:
            with pytest.raises(PeerError, match="trainer"):
                table.check_inside("trainer", row[:, 0], row[:, 1], device)
        else:
            table.check_inside("trainer", row[:, 0], row[:, 1], device)
    assert min(judged.values()) > 200


def test_the_first_bad_range_is_the_one_named() -> None:
    table = RegionTable()
    table.add(4096, 100, HOST)
    addresses = np.array([4096, 4195, 9999], dtype=np.uint64)
    lengths = np.array([100, 2, 1], dtype=np.uint64)
    with pytest.raises(PeerError, match=r"2 bytes at 0x1063 on device -1 .* 1 registered"):
        table.check_inside("trainer", addresses, lengths, HOST)


def test_numbers_near_the_end_of_the_address_space_do_not_wrap_around() -> None:
    """A hostile manifest may hold any 64-bit numbers."""
    table = RegionTable()
    table.add(4096, 100, HOST)
    top = 2**64 - 1
    for address, nbytes in ((4096, top), (top, top), (4100, top - 4000), (0, top)):
        with pytest.raises(PeerError):
            table.check_inside(
                "trainer",
                np.array([address], dtype=np.uint64),
                np.array([nbytes], dtype=np.uint64),
                HOST,
            )
