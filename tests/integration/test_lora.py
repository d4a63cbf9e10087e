"""Live servers that were started with LoRA: updates of the base reach what adapters stand on.

Tokens without and with an adapter are those of transformers, merged in the second case, after each
update and each sleep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.engine_server import EngineServer
from tests.support.engines import VLLM, Engine, real_engines_here
from tests.support.hf_reference import greedy, reference_model
from tests.support.live_models import LiveModel
from tests.support.offers import offered
from tests.support.sglang_server import sglang_server
from tests.support.vllm_server import vllm_server

pytestmark = pytest.mark.engine

KIND, RANK, SCALE, TOKENS = "qwen3_live", 4, 2.0, 12
ADAPTED = tuple(f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down"))


def adapter() -> dict[str, torch.Tensor]:
    """Two factors for each linear layer of the live model, by the adapted module."""
    random = torch.Generator().manual_seed(7)
    factors = {}
    for name, tensor in sorted(LiveModel(kind=KIND, version=0).tensors().items()):
        module = name.removesuffix(".weight")
        if module.endswith(ADAPTED):
            out, wide = tensor.shape
            factors[f"{module}.lora_A"] = torch.randn(RANK, wide, generator=random) * 0.2
            factors[f"{module}.lora_B"] = torch.randn(out, RANK, generator=random) * 0.2
    return factors


def saved(folder: Path) -> Path:
    """The adapter as peft writes it."""
    folder.mkdir()
    named = {f"base_model.model.{name}.weight": each for name, each in adapter().items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK * SCALE,
        "target_modules": ADAPTED,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def expected(version: int, *, adapted: bool) -> list[list[int]]:
    """What transformers says, with the adapter merged or without it."""
    live = LiveModel(kind=KIND, version=version)
    model = deepcopy(reference_model(live.folder))
    factors = adapter() if adapted else {}
    for name in (each for each in factors if each.endswith("lora_A")):
        module = name.removesuffix(".lora_A")
        change = factors[f"{module}.lora_B"] @ factors[name]
        model.state_dict()[f"{module}.weight"].add_(change, alpha=SCALE)
    return [greedy(model, prompt, TOKENS) for prompt in live.prompts()]


def served(engine: Engine, folder: Path) -> AbstractContextManager[EngineServer]:
    """A server that has the adapter, under the name `tuned`."""
    model = LiveModel(kind=KIND, version=0).copy_to(folder / "model")
    named = f"tuned={saved(folder / 'adapter')}"
    lora = ["--enable-lora", "--max-lora-rank", "8"]
    log = folder / "log"
    if engine is VLLM:
        return vllm_server(model, log, arguments=[*lora, "--lora-modules", named], preload=True)
    own = ["--lora-target-modules", *ADAPTED, "--lora-backend", "torch_native"]
    return sglang_server(
        model,
        log,
        arguments=["--engine-plugins-enable", *lora, *own, "--lora-paths", named],
        launcher="tests.support.unpinned_sglang",
        preload=True,
    )


def answer(server: EngineServer, prompt: Sequence[int], *, adapted: bool) -> list[int]:
    """Greedy tokens by the adapter, or by the base alone."""
    if not adapted:
        return server.greedy(prompt, TOKENS)
    body: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    if server.kind == "vllm":
        body |= {"prompt": list(prompt), "max_tokens": TOKENS, "return_token_ids": True}
        said = server.http.post("/v1/completions", json={**body, "model": "tuned"})
    else:
        asked = {"input_ids": list(prompt), "lora_path": "tuned"}
        sampling = {**body, "max_new_tokens": TOKENS}
        said = server.http.post("/generate", json={**asked, "sampling_params": sampling})
    return server.tokens_of(said.raise_for_status())


def assert_serves(server: EngineServer, version: int) -> None:
    for adapted in (False, True):
        prompts = LiveModel(kind=KIND, version=version).prompts()
        said = [answer(server, prompt, adapted=adapted) for prompt in prompts]
        assert said == expected(version, adapted=adapted), f"version {version}, {adapted=}"


def update(server: EngineServer, number: int, version: int) -> None:
    with offered(server.admin, LiveModel(kind=KIND, version=version).tensors()) as offer:
        offer.update(number).raise_for_status()


@pytest.mark.parametrize("engine", real_engines_here(), ids=lambda each: each.kind)
def test_updates_and_sleeps_reach_the_base_under_an_adapter(engine: Engine, tmp_path: Path) -> None:
    assert expected(0, adapted=False) != expected(0, adapted=True)
    with served(engine, tmp_path) as server:
        assert_serves(server, 0)
        for number, version in enumerate((1, 0, 1), 1):
            update(server, number, version)
            assert_serves(server, version)
        for level, version in ((1, 1), (2, 0)):
            server.admin.post("/sleep", json={"level": level}).raise_for_status()
            server.admin.post("/wake").raise_for_status()
            if level == 2:
                update(server, 4, version)
            assert_serves(server, version)
