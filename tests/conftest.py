"""What every test shares: nothing leaves this machine."""

from __future__ import annotations

import os

# Before UCX loads, here and in every child: over tcp it would listen on other addresses too.
os.environ.setdefault("UCX_NET_DEVICES", "lo")
