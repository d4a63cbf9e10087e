"""Slots in block-FP8 form hold what quantizing the whole tensor gives, however it is sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.boxes.placement import SourceBox, assemble
from engine_plugins.weights.sources.forms.block_fp8 import BlockFp8
from engine_plugins.weights.sources.forms.form_source import FormSource
from engine_plugins.weights.sources.megatron.source import megatron_boxes
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.block_fp8 import forms_of, quantized_whole, reference
from tests.support.fetched import fetched
from tests.support.megatron_fixtures import MegatronCase, fixture_folders, megatron_cases
from tests.support.megatron_hf import dense_config, hf_tensors, moe_config
from tests.support.megatron_shards import megatron_ranks

FORM = BlockFp8()
NAME = "model.layers.0.mlp.down_proj.weight"
CASES = [case for folder in fixture_folders() for case in megatron_cases(folder)]


def quantized(
    ranks: Sequence[Sequence[SourceBox]], form: BlockFp8 = FORM
) -> list[Sequence[SourceBox]]:
    """What each rank offers once all have heard each other."""
    sources = [FormSource(partial(list, boxes), forms_of(form)) for boxes in ranks]
    told = [source.measure() for source in sources]
    for source in sources:
        source.settle(blocks for each in told for blocks in each)
    return [source.boxes() for source in sources]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Blocks of very different sizes, so that a scale of another block cannot pass."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    size = torch.exp(8 * torch.rand(rows, columns, generator=generator))
    return (torch.randn(rows, columns, generator=generator) * size).to(dtype)


def cuts(whole: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> list[SourceBox]:
    """A box for each part of a matrix between some rows and columns."""

    def runs(stops: Sequence[int], extent: int) -> list[tuple[int, int]]:
        return list(zip([0, *stops], [*stops, extent], strict=True))

    return [
        SourceBox(
            name=NAME,
            global_shape=tuple(whole.shape),
            start=(top, left),
            data=whole[top:bottom, left:right].clone(),
        )
        for (top, bottom), (left, right) in product(
            runs(rows, whole.shape[0]), runs(columns, whole.shape[1])
        )
    ]


def same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert (
            found[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
        ), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((256, 384), [], []),
        ((300, 130), [], []),
        ((256, 256), [128], []),
        ((512, 256), [], [128]),
        ((500, 300), [167, 334], []),
        ((300, 500), [], [125, 250, 375]),
        ((400, 300), [100, 200, 300], [99, 257]),
        ((70, 60), [20, 40, 41], [30]),
        ((640, 256), [63, 577], [1, 255]),
        ((256, 128), [128, 128, 256], []),
    ],
)
def test_any_cut_gives_the_bits_of_the_whole(
    shape: tuple[int, int], rows: list[int], columns: list[int], dtype: torch.dtype
) -> None:
    """Each part in a process of its own, and fetched by a plan from all of them."""
    whole = matrix(*shape, dtype)
    expected = quantized_whole({NAME: whole}, FORM)
    ranks = quantized([[box] for box in cuts(whole, rows, columns)])
    same_bits(assemble(box for boxes in ranks for box in boxes), expected)
    same_bits(fetched([[box for box in boxes if box.data.numel()] for boxes in ranks]), expected)


def test_replicas_offer_equal_boxes() -> None:
    """As HSDP has them: the same cut twice, told twice."""
    whole = matrix(300, 200)
    boxes = cuts(whole, [100, 200], [])
    ranks = quantized([[box] for box in (*boxes, *boxes)])
    same_bits(fetched(ranks), quantized_whole({NAME: whole}, FORM))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_megatron_shards_give_the_bits_of_the_whole(case: MegatronCase) -> None:
    """Real Megatron jobs; their matrices are smaller than a block, so that all share all."""
    ranks = quantized([megatron_boxes(rank, case.config) for rank in case.ranks()])
    expected = quantized_whole(case.expected(), FORM)
    same_bits(fetched(ranks), expected)
    assert any(name.endswith("_proj.weight_scale_inv") for name in expected)


@pytest.mark.parametrize("experts", ["grouped", "sequential", "legacy"])
@pytest.mark.parametrize("head_dim", [48, 128])
def test_megatron_shards_of_several_blocks(experts: str, head_dim: int) -> None:
    """TP 2, EP 2 and PP 2 with fused QKV, heads that blocks do not end at, turned experts."""
    sizes = {"hidden_size": 320, "head_dim": head_dim, "moe_intermediate_size": 200}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = moe_config("qwen3_moe", **sizes, **heads)
    hf = hf_tensors(config)
    ranks = megatron_ranks(
        hf, config, tp_size=2, ep_size=2, etp_size=2, stages=[[[0]], [[1]]], experts=experts
    )
    offered = quantized([megatron_boxes(rank, config) for rank in ranks])
    same_bits(fetched(offered), quantized_whole(hf, FORM))


def test_later_updates_fill_the_same_slots() -> None:
    """Addresses, manifest and registrations stay; values are those of the moment."""
    tensors = {NAME: matrix(300, 200), "model.norm.weight": torch.ones(8)}
    source = FormSource(lambda: hf_boxes(tensors), forms_of(FORM))
    transport = InMemoryTransport("trainer")
    try:
        with WeightSource(source.boxes, transport) as offered:
            first = offered.manifest_bytes
            for factor in (2.0, 3.0):
                tensors[NAME] = matrix(300, 200) * factor  # another memory, too
                source.settle(source.measure())
                assert not offered.refresh()
                assert offered.manifest_bytes == first
                held = {placed.box.name: placed.memory for placed in offered._placed}
                same_bits(held, quantized_whole(tensors, FORM))
            tensors[NAME] = matrix(100, 200)
            source.settle(source.measure())
            assert offered.refresh(), "another shape needs other slots"
    finally:
        transport.close()


def test_experts_of_one_tensor_are_quantized_in_one_call() -> None:
    """So many launches would take longer than the work."""
    experts = "model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.gate_up_proj": matrix(6 * 512, 256).view(6, 512, 256),
        f"{experts}.down_proj": matrix(6 * 256, 256).view(6, 256, 256),
        NAME: matrix(256, 256),
    }
    shapes = []

    def counted(weights: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
        shapes.append(tuple(weights.shape))
        reference(weights, values, scales)

    source = FormSource(lambda: hf_boxes(tensors), forms_of(FORM, counted))
    source.settle(source.measure())
    held = {box.name: box.data for box in source.boxes()}
    assert len(shapes) <= 4, shapes
    assert sum(shape[0] if len(shape) == 3 else 1 for shape in shapes) == 19
    whole = {box.name: box.data for box in hf_boxes(tensors)}
    same_bits(held, quantized_whole(whole, FORM))


def test_before_the_first_word_slots_are_offered_empty() -> None:
    """What is registered when a sender is made is where every update goes."""
    tensors = {NAME: matrix(300, 200)}
    source = FormSource(lambda: hf_boxes(tensors), forms_of(FORM))
    empty = source.boxes()
    source.settle(source.measure())
    filled = source.boxes()
    assert [box.data.data_ptr() for box in empty] == [box.data.data_ptr() for box in filled]
    same_bits({box.name: box.data for box in filled}, quantized_whole(tensors, FORM))


def test_what_is_not_quantized_is_offered_in_place() -> None:
    """No copy of norms, embeddings or routers; their dtypes are the trainer's."""
    config = moe_config("glm4_moe")
    tensors = hf_tensors(config)
    kept = BlockFp8(kept=("model.layers.1.self_attn", "shared_experts"))
    (boxes,) = quantized([hf_boxes(tensors)], kept)
    held = {box.name: box.data for box in boxes}
    same_bits(held, quantized_whole(tensors, kept))
    scaled = {name.removesuffix("_scale_inv") for name in held if name.endswith("_scale_inv")}
    for name, tensor in tensors.items():
        plain = (
            tensor.ndim == 1
            or name.startswith(("model.embed_tokens", "lm_head", "model.layers.1.self_attn"))
            or name.endswith("mlp.gate.weight")
            or ".shared_experts." in name
        )
        assert (name in scaled) != plain, name
        assert (held[name].data_ptr() == tensor.data_ptr()) == plain, name


def test_others_are_cast_where_the_engine_has_another_dtype() -> None:
    """A trainer in float32, an engine in bfloat16; a router's bias stays as both have it."""
    form = BlockFp8(others=torch.bfloat16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = {
        NAME: matrix(130, 130, torch.float32),
        "model.norm.weight": torch.randn(8),
        bias: torch.randn(4),
        "counter": torch.arange(3),
    }
    (boxes,) = quantized([hf_boxes(tensors)], form)
    held = {box.name: box.data for box in boxes}
    same_bits(held, quantized_whole(tensors, form))
    assert held["model.norm.weight"].dtype == torch.bfloat16
    assert held[bias].data_ptr() == tensors[bias].data_ptr()


def test_a_matrix_of_another_dtype_is_refused() -> None:
    source = FormSource(lambda: hf_boxes({NAME: torch.ones(4, 4).half()}), forms_of(FORM))
    with pytest.raises(SourceError, match=f"{NAME} is torch.float16"):
        source.measure()


def test_what_is_not_finite_costs_the_others_of_its_block_nothing() -> None:
    """The same bits as in the whole tensor, whoever holds it."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        whole = matrix(300, 256, torch.float32)
        whole[70, 3] = bad
        ranks = quantized([[box] for box in cuts(whole, [100, 200], [])])
        same_bits(fetched(ranks), quantized_whole({NAME: whole}, FORM))


def test_the_form_is_read_from_the_config() -> None:
    """Modules that a checkpoint left out, by either of the names that configs have for them."""
    told: dict[str, Any] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["model.layers.0.self_attn"],
        "ignored_layers": ["visual"],
    }
    form = BlockFp8.of_config(dense_config(quantization_config=told))
    assert form == BlockFp8(kept=("model.layers.0.self_attn", "visual"))
    assert not form.quantizes("model.layers.0.self_attn.q_proj.weight", (8, 8))
    assert form.quantizes("model.layers.10.self_attn.q_proj.weight", (8, 8))
    assert not form.quantizes("visual.blocks.0.mlp.up_proj.weight", (8, 8))
    assert not form.quantizes("model.layers.1.mlp.gate.weight", (8, 8))
    assert form.quantizes("model.layers.1.mlp.gate_proj.weight", (8, 8))
    assert not form.quantizes("model.layers.1.mlp.up_proj.bias", (8,))
    assert not BlockFp8().quantizes("lm_head.weight", (8, 8))
    assert BlockFp8(also=("lm_head",)).quantizes("lm_head.weight", (8, 8))
    assert BlockFp8.of_config(dense_config()) == BlockFp8.of_config(None) == BlockFp8()
    assert BlockFp8.of_config({"quantization_config": {**told, "scale_fmt": "ue8m0"}}).ue8m0


@pytest.mark.parametrize(
    "wrong",
    [
        {"quant_method": "awq"},
        {"weight_block_size": [64, 128]},
        {"weight_block_size": None},
        {"activation_scheme": "static"},
    ],
)
def test_another_quantization_is_refused_by_name(wrong: dict[str, Any]) -> None:
    told = {"quant_method": "fp8", "weight_block_size": [128, 128], **wrong}
    with pytest.raises(UnsupportedError, match=f"has {next(iter(wrong))} "):
        BlockFp8.of_config({"quantization_config": told})
