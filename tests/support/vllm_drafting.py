"""A real vLLM engine that drafts with prediction layers, in one process, before and after updates.

    python -m tests.support.vllm_drafting FOLDER

Makes two versions of a small GLM-4 MoE under FOLDER. Prints as JSON what a fresh engine of the
second version says and drafts, and what one of the first version does after each update.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config

from tests.support.drafting_models import drafting_model, save_model
from tests.support.loader_maps import receiving, update
from tests.support.source_ranks import offered_tensors
from vllm_ext.draft_model import draft_of
from vllm_ext.weight_installer import VllmWeightInstaller

__all__ = ["UPDATES"]

UPDATES = (1, 0, 1)
"""Versions that the engine of version 0 is updated to, one after the other."""
PROMPT = [1, 5, 9, 20]


def engine_of(folder: Path) -> LLM:
    return LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=64,
        max_num_seqs=4,
        block_size=32,
        kv_cache_memory_bytes=16 << 20,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    )


def worker_of(engine: LLM) -> Any:
    return engine.llm_engine.model_executor.driver_worker.worker


def answer(engine: LLM) -> dict[str, list[int]]:
    """Greedy tokens, and every token that was drafted on the way."""
    drafter = worker_of(engine).model_runner.drafter
    drafted: list[int] = []

    def propose(*args: Any, **kwargs: Any) -> Any:
        proposed = type(drafter).propose(drafter, *args, **kwargs)
        tokens = proposed[0] if isinstance(proposed, tuple) else proposed
        drafted.extend(tokens.flatten().tolist())
        return proposed

    drafter.propose = propose
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    said = engine.generate([{"prompt_token_ids": PROMPT}], greedy)
    del drafter.propose
    return {"tokens": list(said[0].outputs[0].token_ids), "drafted": drafted}


def main() -> None:
    """Ask a fresh engine, then one that is updated to the same weights."""
    root = Path(sys.argv[1])
    folders = [save_model(root / str(version), drafting_model(version)) for version in (0, 1)]
    said: dict[str, Any] = {"fresh": answer(engine_of(folders[1]))}
    engine = engine_of(folders[0])
    said["before"] = answer(engine)
    worker = worker_of(engine)
    runner, config = worker.model_runner, worker.vllm_config
    model: nn.Module = runner.get_model()
    installer = VllmWeightInstaller(config, model, draft_of(runner, config))
    said["after"], said["direct_bytes"] = [], []
    with receiving(installer) as receiver, set_current_vllm_config(config):
        for version in UPDATES:
            with offered_tensors(load_file(folders[version] / "model.safetensors")) as trainer:
                report = update(receiver, [trainer])
            said["direct_bytes"].append(report.direct_bytes)
            said["after"].append(answer(engine))
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main()
