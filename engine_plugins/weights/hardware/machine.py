"""Which machine this is, by a word that its pods and containers share with no other machine."""

from __future__ import annotations

import socket
from pathlib import Path

__all__ = ["machine_id"]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_id(boot_id: Path = BOOT_ID) -> str:
    """The boot id of the kernel that runs this process; the host's name where it is not shown.

    Hostnames do not do: each pod of a node has its own, and containers of two nodes may have one.
    """
    try:
        return boot_id.read_text().strip() or socket.gethostname()
    except OSError:
        return socket.gethostname()
