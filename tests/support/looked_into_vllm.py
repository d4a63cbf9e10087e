"""vLLM's program in a server that can be looked into: its children import the main module again."""

from __future__ import annotations

import tests.support.looked_into

__all__: list[str] = []

assert tests.support.looked_into.FOLDER

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
