"""vLLM's own sleep mode, of a GPU that is not here: what it is asked for, in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_ext.engine_memory import VllmSleepMode


@pytest.mark.parametrize(("keep", "forgotten"), [(True, []), (False, ["adapters"])])
def test_adapters_are_loaded_anew_after_their_memory_was_discarded(
    keep: bool, forgotten: list[str]
) -> None:
    """They lie in the memory of the weights, and no update brings them."""
    asked: list[str] = []
    runner = SimpleNamespace(reset_lora_state=lambda: asked.append("adapters"))
    worker = SimpleNamespace(
        model_runner=runner,
        sleep=lambda level: asked.append(f"sleep {level}"),
        wake_up=lambda tags: asked.append(f"wake {tags[0]}"),
    )
    memory = VllmSleepMode(worker)
    memory.release("kv_cache", keep=keep)
    memory.release("weights", keep=keep)
    memory.restore("weights")
    memory.restore("kv_cache")
    assert asked == [f"sleep {1 if keep else 2}", "wake weights", *forgotten, "wake kv_cache"]
