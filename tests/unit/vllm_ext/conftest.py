"""vLLM loads our plugin in this process; other tests are to find it, and our loggers, as before."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _loggers_below_root() -> Iterator[None]:
    yield
    for name in ("engine_plugins", "vllm_ext"):
        logging.getLogger(name).parent = logging.getLogger()


@pytest.fixture
def as_before() -> Iterator[None]:
    """VLLM's classes and this process's environment as a test of our hooks has found them."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore

    environment = dict(os.environ)
    hooked: list[Any] = [EngineArgs, app, OpenAIServingResponses, AsyncLLM, EngineCore]
    before = [dict(vars(each)) for each in hooked]
    yield
    os.environ.clear()
    os.environ.update(environment)
    for each, names in zip(hooked, before, strict=True):
        for name in set(vars(each)) - set(names):
            delattr(each, name)
        for name, value in names.items():
            if vars(each)[name] is not value:
                setattr(each, name, value)
