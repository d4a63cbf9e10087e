"""Trainer processes that share blocks send what quantizing the whole tensors gives."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_plugins.errors import SettingsError, UnsupportedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.sources.forms.block_fp8 import BlockFp8
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.block_fp8 import quantized_whole
from tests.support.fake_engine import TOKEN, FakeEngine, served
from tests.support.fetched import fetched_from
from tests.support.fp8_trainer_rank import tiny_model
from tests.support.process_group import output_of_ranks

pytestmark = pytest.mark.nixl

CONFIG: dict[str, Any] = {
    "model_type": "tiny",
    "quantization_config": {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.1.mlp.down_proj"],
    },
}


@pytest.mark.parametrize(("mesh", "ranks", "scales"), [("3", 3, "ue8m0"), ("2x2", 4, "float")])
def test_fsdp_ranks_agree_on_the_blocks_that_they_share(
    mesh: str, ranks: int, scales: str, tmp_path: Path
) -> None:
    """300 and 200 rows over three or two shards; the second update has the same manifests."""
    config = {
        **CONFIG,
        "quantization_config": {**CONFIG["quantization_config"], "scale_fmt": scales},
    }
    engine = FakeEngine(pulls=False)
    held: list[dict[str, torch.Tensor]] = []

    def fetch() -> None:
        reader = NixlTransport(f"test-engine-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            held.append(fetched_from(list(engine.sources.values()), reader))
        finally:
            reader.close()

    engine.after_update = fetch
    with served(engine):
        said = output_of_ranks(
            "tests.support.fp8_trainer_rank",
            *(mesh, str(tmp_path / "rendezvous"), engine.url, json.dumps(config), "2"),
        )
    assert len(said.splitlines()) == 2 * ranks
    assert len(engine.sources) == ranks
    assert len(engine.plans) == 1
    tensors = {name: each.detach() for name, each in tiny_model().named_parameters()}
    form = BlockFp8.of_config(config)
    assert form.ue8m0 == (scales == "ue8m0")
    for number, found in enumerate(held, 1):
        now = {name: each * (-2.0) ** number for name, each in tensors.items()}
        expected = quantized_whole(now, form)
        assert set(found) == set(expected)
        assert "model.layers.1.mlp.down_proj.weight_scale_inv" not in expected
        assert "model.layers.0.mlp.down_proj.weight_scale_inv" in expected
        for name, tensor in expected.items():
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_quantization_that_does_not_exist_is_refused() -> None:
    """When the sender is made, by its name or by the config's."""
    url = "http://127.0.0.1:1"
    with pytest.raises(SettingsError, match="'int4'"):
        WeightSender.from_hf({}, engines=url, token=TOKEN, quantization="int4")  # type: ignore[arg-type]
    other = {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(UnsupportedError, match="quant_method 'awq'"):
        WeightSender.from_hf({}, engines=url, token=TOKEN, quantization="fp8", config=other)
