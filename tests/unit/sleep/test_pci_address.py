"""One GPU, two spellings of its place."""

from __future__ import annotations

import pytest

from engine_plugins.sleep.pci_address import sysfs_pci_address


@pytest.mark.parametrize("text", ["00000000:1A:00.0", "0000:1a:00.0", " 0:1A:00.0\n"])
def test_every_spelling_becomes_that_of_sysfs(text: str) -> None:
    assert sysfs_pci_address(text) == "0000:1a:00.0"


def test_a_domain_of_its_own_is_kept() -> None:
    assert sysfs_pci_address("00010000:C1:00.0") == "10000:c1:00.0"


@pytest.mark.parametrize("text", ["", "vram0", "1a:00.0", "GPU-1:2", "x:1a:00.0", "[N/A]"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no PCI address|invalid literal"):
        sysfs_pci_address(text)
