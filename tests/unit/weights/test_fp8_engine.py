"""An engine with FP8 parameters is fed by trainers in bfloat16 and float32, pulled and pushed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import pytest
import torch

from engine_plugins.errors import WeightMismatchError
from engine_plugins.sender.peer_writes import PeerWrites
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.contract.destinations import Destination
from engine_plugins.weights.sources.forms.block_fp8 import BlockFp8
from engine_plugins.weights.sources.forms.form_source import FormSource
from engine_plugins.weights.sources.megatron.source import megatron_boxes
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from engine_plugins.weights.transport.transfers import run_transfers
from tests.support.block_fp8 import forms_of, quantized_whole
from tests.support.in_memory_model import InMemoryModel
from tests.support.in_memory_rank import InMemoryRank
from tests.support.megatron_hf import dense_config, hf_tensors
from tests.support.megatron_shards import megatron_ranks
from tests.support.sharded_model import ShardedModel, gathered
from tests.support.source_ranks import offered_tensors

SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "vocab_size": 64}
CONFIG = dense_config("qwen3", **SIZES)
MATRIX = "model.layers.0.mlp.up_proj.weight"

Tensors = Mapping[str, torch.Tensor]
Ranks = Sequence[Sequence[SourceBox]]
_serial = itertools.count()


class Trainer:
    """Ranks of a trainer, each with its slots, its wire and what it offers."""

    def __init__(self, ranks: Ranks, form: BlockFp8, stack: ExitStack) -> None:
        self.boxes = ranks
        self.transports: list[InMemoryTransport] = []
        self.sources: list[WeightSource] = []
        self._quantizers: list[FormSource] = []
        for boxes in ranks:
            transport = InMemoryTransport(f"fp8-trainer-{next(_serial)}")
            stack.callback(transport.close)
            quantizer = FormSource(partial(list, boxes), forms_of(form))
            self._quantizers.append(quantizer)
            self.transports.append(transport)
            self.sources.append(stack.enter_context(WeightSource(quantizer.boxes, transport)))

    def refresh(self) -> bool:
        """Quantize anew; whether an address changed."""
        told = [blocks for each in self._quantizers for blocks in each.measure()]
        for quantizer in self._quantizers:
            quantizer.settle(told)
        moved = [source.refresh() for source in self.sources]
        return any(moved)

    def write(self, destinations: Sequence[Destination]) -> None:
        """All that is to be written to some engine ranks."""
        for destination, transport in itertools.product(destinations, self.transports):
            mine = destination.writes.get(transport.agent)
            if mine is not None:
                transport.add_peer(destination.agent, destination.agent_metadata)
                writes = PeerWrites("the engine", destination.agent, transport)
                for local, remote, rows in mine.by_devices():
                    writes.add(rows, local_device=local, remote_device=remote)
                writes.begin()
                run_transfers(writes.writes, deadline_s=10)
                writes.release(ended=True)


@contextmanager
def engine(
    checkpoint: Tensors, tp_size: int
) -> Iterator[tuple[list[InMemoryRank], list[ShardedModel]]]:
    """An engine that was started with a checkpoint."""
    models = [
        ShardedModel(
            {name: tensor.shape for name, tensor in checkpoint.items()},
            tied=False,
            tp_rank=tp_rank,
            tp_size=tp_size,
            dtypes={name: tensor.dtype for name, tensor in checkpoint.items()},
        )
        for tp_rank in range(tp_size)
    ]
    with ExitStack() as stack:
        ranks = []
        for tp_rank, model in enumerate(models):
            made = cast(InMemoryModel, model)
            ranks.append(InMemoryRank(made, tp_rank=tp_rank, direct_landing=True))
            stack.callback(ranks[-1].close)
        yield ranks, models


def update(ranks: Sequence[InMemoryRank], trainer: Trainer, direction: str) -> bool:
    """Connect anew and take one update; whether all of it landed in live parameters."""
    manifests = [source.manifest for source in trainer.sources]
    plan = f"plan-{next(_serial)}"
    push = direction == "push"
    results = [
        rank.receiver.connect(plan, manifests, direction="push" if push else "pull")
        for rank in ranks
    ]
    for rank in ranks:
        rank.receiver.start(plan, staged=push, timeout_s=10)
    if push:
        trainer.write([each.destination for each in results if each.destination])
        for rank in ranks:
            rank.receiver.written()
    reports = [rank.install_all() for rank in ranks]
    return all(report.loader_bytes == 0 for report in reports)


def assert_holds(models: Sequence[ShardedModel], expected: Tensors) -> None:
    """Every parameter of every rank, bit for bit."""
    held = gathered(models, expected)
    for name, tensor in expected.items():
        assert held[name].dtype == tensor.dtype, name
        assert torch.equal(held[name].view(torch.uint8), tensor.view(torch.uint8)), name


def uneven(tensors: Tensors, count: int) -> Ranks:
    """Shares as FSDP2 cuts them: rows, none of which end where blocks do."""
    ranks: list[list[SourceBox]] = [[] for _ in range(count)]
    for name, tensor in tensors.items():
        begun = 0
        for rank, part in enumerate(tensor.chunk(count)):
            start = (begun, *[0] * (tensor.ndim - 1))
            begun += len(part)
            box = SourceBox(name=name, global_shape=tuple(tensor.shape), start=start, data=part)
            ranks[rank].append(box)
    return ranks


def sharded(way: str, tensors: dict[str, torch.Tensor]) -> Ranks:
    if way == "plain":
        return [hf_boxes(tensors)]
    if way == "megatron":
        made = megatron_ranks(tensors, CONFIG, tp_size=2, stages=[[[0]], [[1]]])
        return [megatron_boxes(rank, CONFIG) for rank in made]
    return uneven(tensors, 3)


@pytest.mark.parametrize(
    ("way", "tp_size", "direction", "dtype"),
    [
        ("plain", 1, "pull", torch.bfloat16),
        ("plain", 2, "push", torch.float32),
        ("fsdp-uneven", 1, "push", torch.bfloat16),
        ("fsdp-uneven", 2, "pull", torch.float32),
        ("megatron", 1, "pull", torch.float32),
        ("megatron", 2, "push", torch.bfloat16),
    ],
)
def test_its_parameters_are_those_of_the_quantized_checkpoint(
    way: str, tp_size: int, direction: str, dtype: torch.dtype
) -> None:
    """Twice; with the second, the same slots land where the engine serves from."""
    tensors = {name: tensor.to(dtype) for name, tensor in hf_tensors(CONFIG).items()}
    now = {name: tensor.clone() for name, tensor in tensors.items()}
    form = BlockFp8(others=torch.bfloat16)
    with ExitStack() as stack:
        trainer = Trainer(sharded(way, tensors), form, stack)
        whole = quantized_whole(tensors, form)
        ranks, models = stack.enter_context(engine(whole, tp_size))
        for number in range(2):
            for boxes in trainer.boxes:
                for box in boxes:
                    box.data.mul_(-2.0)
            for tensor in now.values():
                tensor.mul_(-2.0)
            assert not trainer.refresh()
            direct = update(ranks, trainer, direction)
            assert direct == (number > 0)
            assert_holds(models, quantized_whole(now, form))


def refused(offered: Tensors, wanted: Tensors) -> str:
    """What an engine of one checkpoint says to the tensors of another, when it is connected to."""
    with offered_tensors(offered) as trainer, engine(wanted, 1) as (ranks, _):
        with pytest.raises(WeightMismatchError) as caught:
            ranks[0].receiver.connect("plan", [trainer.manifest], direction="push")
        return str(caught.value)


def test_unquantized_weights_are_refused_when_they_are_connected() -> None:
    """The engine's own cast would lose them without a word; both sides are named."""
    tensors = hf_tensors(CONFIG)
    said = refused(tensors, quantized_whole(tensors, BlockFp8()))
    parameter = "model.layers.0.mlp.gate_up_proj.up_proj_weight"
    assert f"{MATRIX} is float32, {parameter} wants float8_e4m3fn" in said


def test_quantized_weights_are_refused_by_an_engine_that_is_not() -> None:
    tensors = hf_tensors(CONFIG)
    said = refused(quantized_whole(tensors, BlockFp8()), tensors)
    parameter = "model.layers.0.mlp.gate_up_proj.up_proj_weight"
    assert f"{MATRIX} is float8_e4m3fn, {parameter} wants float32" in said


def test_a_module_that_only_one_side_quantizes_is_named() -> None:
    tensors = hf_tensors(CONFIG)
    ours, theirs = BlockFp8(kept=("layers.0.mlp",)), BlockFp8()
    said = refused(quantized_whole(tensors, ours), quantized_whole(tensors, theirs))
    assert f"{MATRIX} is float32" in said
    assert "layers.1" not in said


@pytest.mark.parametrize("leaf", ["weight", "weight_scale_inv"])
def test_a_slot_of_another_shape_is_refused(leaf: str) -> None:
    """Values or scales: the loader's own check says what it wants, ours what came."""
    whole = quantized_whole(hf_tensors(CONFIG), BlockFp8())
    name = MATRIX.replace("weight", leaf)
    other = {**whole, name: whole[name][:-1].clone()}
    said = refused(other, whole)
    assert name in said
    assert str(tuple(whole[name].shape)) in said
    assert str(tuple(other[name].shape)) in said


def test_scales_in_another_form_are_refused() -> None:
    """As exponents of one byte, say."""
    whole = quantized_whole(hf_tensors(CONFIG), BlockFp8())
    name = MATRIX + "_scale_inv"
    other = {**whole, name: torch.full_like(whole[name], 1.0).to(torch.float8_e8m0fnu)}
    parameter = "model.layers.0.mlp.gate_up_proj.up_proj_weight_scale_inv"
    assert f"{name} is float8_e8m0fnu, {parameter} wants float32" in refused(other, whole)
