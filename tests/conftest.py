"""What every test shares: one thread, nothing leaves this machine, SGLang finds its shims."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.cpu_features import cpu_line

pytest_plugins = ("tests.support.shared_servers",)

SGLANG_SHIMS = Path(__file__).parent / "support" / "sglang_shims"

# `make test` runs the tests in the environment of each engine, those marked `core` in vLLM's only.
TESTS_OF_AN_ENGINE = {
    "vllm": ["integration/test_vllm_*", "unit/vllm_ext"],
    "sglang": ["integration/test_sglang_*", "unit/sglang_ext"],
}
collect_ignore_glob = [
    pattern
    for engine, patterns in TESTS_OF_AN_ENGINE.items()
    if importlib.util.find_spec(engine) is None
    for pattern in patterns
]

# By default Hypothesis fails an example that takes 0.2 s, as any can on a busy machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Before torch loads, here and in every child: its threads wait for each other at every operation,
# which on a busy machine takes far longer than the work on these small tensors.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before UCX loads, here and in every child: over tcp it would listen on other addresses too.
os.environ.setdefault("UCX_NET_DEVICES", "lo")


def pytest_report_header(config: pytest.Config) -> str:
    """Engines choose kernels by the CPU: a result says which kind it is of."""
    return f"cpu: {cpu_line()}"


def _use_sglang_shims() -> None:
    """Here and in every child, before anything imports torchvision or SGLang."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    sys.path.insert(0, str(SGLANG_SHIMS))
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SGLANG_SHIMS), inherited]))
    importlib.import_module("tests.support.sglang_shims.sitecustomize")


if importlib.util.find_spec("sglang") is not None:
    _use_sglang_shims()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what downloads a wheel, unless it is asked for."""
    if "wheel" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("wheel") is None]
    if len(left) < len(items):
        config.hook.pytest_deselected(items=[each for each in items if each not in left])
        items[:] = left
