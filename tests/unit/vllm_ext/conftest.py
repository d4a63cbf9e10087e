"""vLLM loads our plugin in this process; other tests are to find our loggers as they were."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _loggers_below_root() -> Iterator[None]:
    yield
    for name in ("engine_plugins", "vllm_ext"):
        logging.getLogger(name).parent = logging.getLogger()
