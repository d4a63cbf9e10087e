"""Families by Megatron-Bridge's own mapping, where the trainer has Bridge loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.megatron.bridge import bridge_family
from engine_plugins.weights.sources.megatron.source import megatron_boxes_of
from tests.support.megatron_hf import hf_tensors, moe_config
from tests.support.megatron_shards import megatron_ranks

ROOT = Path(__file__).parents[3]
MEGATRON = ROOT / ".venv" / "megatron" / "bin" / "python"
CONVERSION = "megatron.bridge.models.conversion"
LAYER, HF = "decoder.layers.*.", "model.layers.*."


class AutoMapping:
    """Named as Bridge's classes are, and made as they are."""

    permute_dims: tuple[int, ...] | None = None

    def __init__(self, megatron_param: str, hf_param: str | dict[str, str]) -> None:
        self.megatron_param = megatron_param
        self.hf_param = hf_param


class QKVMapping(AutoMapping):
    pass


class GatedMLPMapping(AutoMapping):
    pass


class ReplicatedMapping(AutoMapping):
    pass


class RowParallelMapping(AutoMapping):
    pass


class Scaled(AutoMapping):
    """A bridge's own class, which computes."""


def mappings() -> list[AutoMapping]:
    """Those of Qwen3-MoE, experts in both of Megatron's forms."""
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.router.weight": "mlp.gate.weight",
    }
    gated = {"gate": "gate_proj", "up": "up_proj"}
    experts = {
        part: f"{HF}mlp.experts.*.{name}.weight"
        for part, name in (gated | {"": "down_proj"}).items()
    }
    down = experts.pop("")
    return [
        AutoMapping("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        AutoMapping("output_layer.weight", "lm_head.weight"),
        ReplicatedMapping("decoder.final_layernorm.weight", "model.norm.weight"),
        *(ReplicatedMapping(LAYER + native, HF + hf) for native, hf in layer.items()),
        QKVMapping(
            LAYER + "self_attention.linear_qkv.weight",
            {part: f"{HF}self_attn.{part}_proj.weight" for part in "qkv"},
        ),
        RowParallelMapping(
            LAYER + "self_attention.linear_proj.weight", HF + "self_attn.o_proj.weight"
        ),
        GatedMLPMapping(LAYER + "mlp.experts.linear_fc1.weight*", experts),
        RowParallelMapping(LAYER + "mlp.experts.linear_fc2.weight*", down),
        GatedMLPMapping(LAYER + "mlp.experts.local_experts.*.linear_fc1.weight", experts),
        RowParallelMapping(LAYER + "mlp.experts.local_experts.*.linear_fc2.weight", down),
        Scaled(LAYER + "mlp.router.scale", HF + "mlp.gate.scale"),
    ]


class Bridge:
    """What `get_model_bridge` makes, and the registry that it gives."""

    def mapping_registry(self) -> Bridge:
        return self

    def get_all_mappings(self) -> list[AutoMapping]:
        return mappings()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Bridge's two modules, as far as they are looked at."""
    conversion = ModuleType("model_bridge")
    conversion.get_model_bridge = ModuleType("dispatch")  # type: ignore[attr-defined]
    conversion.get_model_bridge._exact_types = {"MineForCausalLM": lambda _: Bridge()}
    classes = ModuleType("param_mapping")
    for kind in (AutoMapping, QKVMapping, GatedMLPMapping, ReplicatedMapping, RowParallelMapping):
        setattr(classes, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, f"{CONVERSION}.model_bridge", conversion)
    monkeypatch.setitem(sys.modules, f"{CONVERSION}.param_mapping", classes)
    return conversion


def config(**changes: Any) -> dict[str, Any]:
    mine = {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    return moe_config("qwen3_moe") | mine | changes


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
def test_a_family_that_no_table_has_goes_by_bridges_mapping(
    loaded: ModuleType, experts: str
) -> None:
    """Shapes are what the shards and the cut make of them."""
    hf = hf_tensors(config() | {"model_type": "qwen3_moe"})
    ranks = megatron_ranks(
        hf, config(), tp_size=4, ep_size=2, etp_size=2, stages=[[[0]], [[1]]], experts=experts
    )
    found = assemble(megatron_boxes_of(ranks, config()))
    assert found.keys() == hf.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in hf.items())


def test_without_bridge_there_is_none_and_an_unknown_model_is_none(loaded: ModuleType) -> None:
    assert bridge_family(config(architectures=["OtherForCausalLM"])) is None
    del sys.modules[f"{CONVERSION}.model_bridge"]
    assert bridge_family(config()) is None


def test_a_mapping_that_computes_is_refused_once_it_is_needed(loaded: ModuleType) -> None:
    (rank,) = megatron_ranks(hf_tensors(config() | {"model_type": "qwen3_moe"}), config())
    tensors = {**rank.chunks[0].tensors, "decoder.layers.0.mlp.router.scale": torch.zeros(1)}
    rank.chunks[0].__dict__["tensors"] = tensors
    with pytest.raises(UnsupportedError, match=r"router\.scale: Megatron-Bridge maps .*Scaled"):
        megatron_boxes_of([rank], config())


def test_a_model_without_a_head_in_the_mapping_is_tied(
    loaded: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's config says nothing of it; the last stage of several has a copy to leave out."""
    kept = [mapping for mapping in mappings() if "output_layer" not in mapping.megatron_param]
    family = bridge_family(config())
    assert family is not None
    assert not family.tied
    monkeypatch.setattr(Bridge, "get_all_mappings", lambda self: kept)
    family = bridge_family(config())
    assert family is not None
    assert family.tied


def test_a_bridge_that_gives_nothing_is_an_error(
    loaded: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bridge, "get_all_mappings", lambda self: self.missing)
    with pytest.raises(UnsupportedError, match="Bridge of Megatron-Bridge gives no mapping"):
        bridge_family(config())


FOLLOWED = (
    "GemmaForCausalLM",
    "MistralForCausalLM",
    "NemotronForCausalLM",
    "NemotronHForCausalLM",
    "OlmoeForCausalLM",
)
"""Among the models that only Bridge knows, those of language alone."""
OTHERWISE = {"gpt_oss": "GPTOSSMLP", "qwen3_next": "A_log", "mixtral": "", "qwen2_moe": ""}
"""Families of ours that Bridge maps by classes of its own, or does not know."""


@pytest.mark.skipif(not MEGATRON.exists(), reason="Megatron is not here: make setup-megatron")
def test_bridges_own_mappings_are_our_tables() -> None:
    """Rule by rule, and the HF tensors of every case rebuilt by megatron-bridge 0.3.1 alone."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [MEGATRON, "-W", "ignore", "-m", "tests.support.bridge_mappings"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        timeout=180,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    for case, judged in told["cases"].items():
        family = next((family for family in OTHERWISE if case.startswith(family)), None)
        if judged == "unknown":
            assert family in ("mixtral", "qwen2_moe") or family is None, case
        elif family is None:
            assert judged == "same", f"{case}: {judged}"
        else:
            assert OTHERWISE[family], f"{case}: {judged}"
            assert OTHERWISE[family] in judged, f"{case}: {judged}"
    assert list(told["cases"].values()).count("same") > 0
    assert not any(told["models"][model] for model in FOLLOWED)
