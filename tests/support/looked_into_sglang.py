"""SGLang's program in a server that can be looked into, as each of its processes then is."""

from __future__ import annotations

import tests.support.looked_into
from tests.support.sglang_launcher import launch

__all__: list[str] = []

assert tests.support.looked_into.FOLDER

if __name__ == "__main__":
    launch()
