"""PCI addresses: NVIDIA's tools and the kernel write them differently."""

from __future__ import annotations

__all__ = ["sysfs_pci_address"]


def sysfs_pci_address(text: str) -> str:
    """`00000000:1A:00.0` as sysfs writes it, `0000:1a:00.0`.

    Raises:
        ValueError: the text is no PCI address.
    """
    domain, _, rest = text.strip().lower().partition(":")
    bus, colon, place = rest.partition(":")
    if not colon or "." not in place:
        raise ValueError(f"{text!r} is no PCI address")
    return f"{int(domain, 16):04x}:{int(bus, 16):02x}:{place}"
