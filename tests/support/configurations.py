"""The servers that the contract suite is run on."""

from __future__ import annotations

import pytest

from tests.support.live_models import LiveModel
from tests.support.served import Configuration
from tests.support.sized_models import SizedModel

__all__ = [
    "ALL_MODELS",
    "DENSE",
    "DENSE_TP2",
    "MOE",
    "MOE_TP2",
    "NEW",
    "OLD",
    "SIZED",
    "on",
]

OLD, NEW = LiveModel(kind="qwen3_live", version=0), LiveModel(kind="qwen3_live", version=1)

DENSE = Configuration(name="dense", model=OLD, tcp=True, token_file=True, keyed=True)
# Trainers are stopped here in the middle of an install, which live parameters would not survive.
# vLLM's official hook for routes is on beside the one that our worker extension comes with.
DENSE_TP2 = Configuration(
    name="dense-tp2",
    model=OLD,
    tensor_parallel=2,
    api_servers=2,
    tcp=True,
    watched=True,
    direct_landing=False,
    environment={"VLLM_PLUGINS": "engine_plugins"},
)
TIED, TIED_TP2, MOE, MOE_TP2 = (
    Configuration(
        name=name + ("-tp2" if tensor_parallel == 2 else ""),
        model=LiveModel(kind=kind, version=tensor_parallel - 1),
        tensor_parallel=tensor_parallel,
        real=tensor_parallel == real_tensor_parallel,
    )
    for name, kind, real_tensor_parallel in (
        ("tied", "qwen2_live", 1),
        ("moe", "qwen3_moe_live", 2),
    )
    for tensor_parallel in (1, 2)
)
"""Real engines have one size of each; all are in tests/unit/weights/test_megatron_fixtures.py."""
SIZED = Configuration(name="sized", model=SizedModel())

ALL_MODELS = (DENSE, DENSE_TP2, TIED, TIED_TP2, MOE, MOE_TP2)


def on(*configurations: Configuration) -> pytest.MarkDecorator:
    """Run a test, or a module's tests, on servers of these configurations."""
    return pytest.mark.parametrize(
        "served", [pytest.param(each, id=each.name) for each in configurations], indirect=True
    )
