"""A live vLLM server with an FP8 KV cache: by the CPU it serves and is updated, or does not start.

vLLM says that it needs AVX-512 or AMX for one. Which of the two tests runs is asked of the CPU as
vLLM asks it, and the header of the run says of what kind it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.cpu_features import serves_fp8_kv
from tests.support.live_models import LiveModel
from tests.support.offers import offered
from tests.support.vllm_server import vllm_server
from tests.unit.vllm_ext.test_kv_scales import SERVED

pytestmark = pytest.mark.engine

SATURATING, FITTING = 1e-5, 0.02
"""Scales of a cache: of values up to 448 times as large it keeps the size."""


def with_scales(version: int, scale: float) -> dict[str, torch.Tensor]:
    """A live model's tensors, and one scale for the keys and values of all of its layers."""
    model = LiveModel(kind="qwen3_live", version=version)
    names = [
        f"model.layers.{layer}.self_attn.{part}_scale"
        for layer in range(int(str(model.config()["num_hidden_layers"])))
        for part in "kv"
    ]
    return model.tensors() | {name: torch.tensor([scale]) for name in names}


def saved(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir()
    config = LiveModel(kind="qwen3_live", version=0).config()
    quantization = SERVED["quantization_config"]
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_server_has_the_scales_of_its_last_update_or_does_not_start(tmp_path: Path) -> None:
    """Cached keys and values are scaled by the update's: tokens are those of a fresh server."""
    old, new = with_scales(0, SATURATING), with_scales(1, FITTING)
    folder = saved(tmp_path / "old", old)
    server = vllm_server(folder, tmp_path / "log", preload=True)
    if not serves_fp8_kv():
        with pytest.raises(RuntimeError, match="did not come up"), server:
            pass
        said = (tmp_path / "log").read_text(errors="replace")
        assert "FP8 KV cache on CPU requires x86 with AVX-512 or AMX." in said
        return
    prompts = LiveModel(kind="qwen3_live", version=1).prompts()
    with server as updated, offered(updated.admin, new) as offer:
        before = [updated.greedy(prompt) for prompt in prompts]
        assert offer.update(1).raise_for_status().json()["outcome"] == "installed"
        after = [updated.greedy(prompt) for prompt in prompts]
    with vllm_server(saved(tmp_path / "new", new), tmp_path / "log_of_new") as fresh:
        assert after == [fresh.greedy(prompt) for prompt in prompts]
    unscaled = with_scales(1, SATURATING)
    with vllm_server(saved(tmp_path / "unscaled", unscaled), tmp_path / "log_of_unscaled") as other:
        assert after != [other.greedy(prompt) for prompt in prompts], "old scales would show"
    assert before != after
