"""An SGLang rank of a GPU sleeps by SGLang's memory saver: its adapter, on a fake CUDA driver."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.utils.torch_memory_saver_adapter import _TorchMemorySaverAdapterReal
from torch import nn

from engine_plugins.settings import Settings
from engine_plugins.sleep.hook_mode import HookMode
from engine_plugins.sleep.memory_backend import MEMORY_TAGS
from engine_plugins.sleep.memory_ledger import MemoryLedger
from sglang_ext.engine_memory import memory_backend, tagged_tensors
from tests.support.after_import import run_after_import
from tests.support.fake_cuda_driver import FakeGpu, start_environment

MIB = 1 << 20
GRAPHS = "SGLANG_MEMORY_SAVER_CUDA_GRAPH"


def test_sglang_names_its_regions_as_tags_are_named() -> None:
    assert sorted(GPU_MEMORY_ALL_TYPES) == sorted(MEMORY_TAGS)


def sleep(mode: HookMode, keep: bool, backed_up: bool) -> dict[str, Any]:
    """One sleep of a scheduler's memory, and what is there after it."""
    gpu = FakeGpu(mode)
    weights = gpu.region("weights", 4 * MIB, cpu_backup=backed_up).fill_(3)
    cache = gpu.region("kv_cache", 2 * MIB)
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(weights.view(torch.float32)))
    buffer = gpu.region("weights", 2 * MIB, cpu_backup=backed_up).fill_(5)
    model.register_buffer("rope", buffer, persistent=False)
    runner = SimpleNamespace(
        device="cuda", model=model, token_to_kv_pool=SimpleNamespace(k_buffer=[cache])
    )
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=runner),
        server_args=SimpleNamespace(enable_memory_saver=True, enable_weights_cpu_backup=backed_up),
        memory_saver_adapter=_TorchMemorySaverAdapterReal(),
    )
    free = lambda: (gpu.free_bytes(), 0)  # noqa: E731
    with (
        mock.patch("torch.cuda.mem_get_info", free),
        mock.patch("torch.cuda.memory_snapshot", list),
    ):
        tensors = tagged_tensors(scheduler)
        backend = memory_backend(scheduler, tensors, Settings())
        assert backend is not None
        ledger = MemoryLedger(backend)
        at_first = gpu.free_bytes()
        ledger.release([tag for tag in ledger.tags if tag != "cuda_graph"], keep=keep)
        freed = gpu.free_bytes() - at_first
        ledger.restore([tag for tag in ledger.tags if tag != "cuda_graph"])
    return {
        "tags": ledger.tags,
        "freed": freed,
        "weights": bool((weights == 3).all()),
        "buffer": bool((buffer == 5).all()),
    }


def test_weights_return_with_or_without_sglangs_own_copy(tmp_path: Path) -> None:
    """Buffers return always; a sleep of level 2 keeps nothing else."""
    settings: dict[str, str | None]
    settings = {"ENGINE_PLUGINS_MEMORY_SAVER_HOOK_MODE": "preload", GRAPHS: "1"}
    cases = [
        (settings, ["preload", *each]) for each in ((True, False), (True, True), (False, False))
    ]
    (kept, _), (backed_up, _), (level_2, _) = run_after_import(
        sleep, cases, at_start=start_environment(tmp_path, "preload")
    )
    tags = ["weights", "kv_cache", "cuda_graph"]
    whole = {"tags": tags, "freed": 8 * MIB, "weights": True, "buffer": True}
    assert [kept, backed_up] == [whole, whole]
    assert level_2 == {**whole, "weights": False}


def test_without_the_memory_saver_there_is_nothing_to_sleep_by() -> None:
    """Routes then say what to start the engine with."""
    runner = SimpleNamespace(device="cuda", model=nn.Module(), token_to_kv_pool=SimpleNamespace())
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=runner),
        server_args=SimpleNamespace(enable_memory_saver=False),
    )
    assert memory_backend(scheduler, tagged_tensors(scheduler), Settings()) is None
