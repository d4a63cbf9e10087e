"""What an agent of NIXL finds around it when it starts: UCX's devices, and a HOME to read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engine_plugins.errors import NotConfiguredError

__all__ = ["home_is_readable", "net_devices_are"]

_NET_DEVICES = "UCX_NET_DEVICES"
_starting = threading.Lock()
"""One agent starts at a time: each reads the environment as it shall be for it."""


@contextmanager
def net_devices_are(devices: str | None) -> Iterator[None]:
    """Let UCX see these devices. Put back afterwards: processes started later inherit it."""
    with _starting:
        before = os.environ.get(_NET_DEVICES)
        if devices is not None:
            os.environ[_NET_DEVICES] = devices
        try:
            yield
        finally:
            if devices is not None and before is None:
                del os.environ[_NET_DEVICES]
            elif devices is not None and before is not None:
                os.environ[_NET_DEVICES] = before


@contextmanager
def home_is_readable() -> Iterator[None]:
    """NIXL looks for `.nixl.cfg` in HOME, and raises what C++ does where it may not look."""
    try:
        yield
    except RuntimeError as error:
        if "nixl.cfg" not in str(error):
            raise
        raise NotConfiguredError(
            f"NIXL looks for its configuration in HOME ({os.environ.get('HOME')}), which this "
            f"process may not read, so it does not start: {error}",
            remedy="set HOME to a folder that this user may read; in a container with an arbitrary "
            "uid /tmp will do",
        ) from error
