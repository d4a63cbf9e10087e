"""A receive buffer has room for what a rank needs of its tensors, and a loader sees them whole."""

from __future__ import annotations

import json
import mmap
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval
from engine_plugins.weights.loader.coverage import engine_steps
from engine_plugins.weights.loader.loader_trace import trace_loader
from engine_plugins.weights.loader.needed import needed_boxes
from engine_plugins.weights.planning.plan import build_plan
from engine_plugins.weights.receiving.prepared_fetch import PreparedFetch
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.loader_maps import (
    PlayedInstaller,
    loaded,
    logical,
    played_engine,
    receiving,
    same_bits,
    update,
)
from tests.support.source_ranks import offered_tensors

MIB = 1 << 20
_agents = count()
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 128,
    "head_dim": 16,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@st.composite
def wanted(draw: st.DrawFn) -> tuple[tuple[int, ...], Interval]:
    """A shape, and a box of it that has elements."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    extent = tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, start, strict=True))
    return shape, (start, extent)


@pytest.mark.core
@given(st.lists(wanted(), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_the_box_that_is_needed_is_where_the_whole_says(
    drawn: list[tuple[tuple[int, ...], Interval]], strided: bool, staged: bool
) -> None:
    """Of any shapes and boxes, in memory for the boxes alone; whole rows look contiguous."""
    held = {
        f"t{number}": torch.randn(shape, dtype=torch.float64)
        for number, (shape, _) in enumerate(drawn)
    }
    needed = {f"t{number}": (box,) for number, (_, box) in enumerate(drawn)}
    tensors = [_logical(name, *each.shape, dtype=each.dtype) for name, each in held.items()]
    steps = [([tensor.name], [tensor]) for tensor in tensors]
    engine = InMemoryTransport(f"engine-{next(_agents)}")
    with offered_tensors(held) as trainer:
        manifests = [trainer.manifest]
        names = frozenset(held) if strided else frozenset()
        plan = build_plan(manifests, steps, needed, strided=names)
        fetch = PreparedFetch(plan, manifests, engine, staged=staged)
        for index in range(len(steps)):
            fetch.run_steps(
                range(index, index + 1), stall_timeout_s=5, deadline=1e12, cancelled=lambda: False
            )
            ((name, view),) = fetch.tensors(index)
            start, extent = needed[name][0]
            box = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
            assert view.shape == held[name].shape
            assert torch.equal(view[box], held[name][box])
            assert view.clone().shape == view.shape, "what is not needed may be read, too"
            assert strided or view.is_contiguous()
        if strided:
            sizes = [held[name][_slices(boxes)].nbytes for name, boxes in needed.items()]
            assert plan.total_bytes < sum(size + 64 for size in sizes)
        fetch.close()
    engine.close()


def _slices(boxes: tuple[Interval, ...]) -> tuple[slice, ...]:
    start, extent = boxes[0]
    return tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))


@pytest.mark.core
def test_what_is_registered_and_resident_is_what_is_needed() -> None:
    """An eighth of the rows of one matrix and of the columns of another, of 256 MiB each."""
    whole = torch.empty(8192, 8192, dtype=torch.float32)
    for part in (whole[1024:2048], whole[:, 1024:2048]):
        part.fill_(3)
    rows, columns = ((1024, 0), (1024, 8192)), ((0, 1024), (8192, 1024))
    needed = {"up": (rows,), "down": (columns,)}
    engine = InMemoryTransport(f"engine-{next(_agents)}")
    with offered_tensors({"up": whole, "down": whole}) as trainer:
        manifests = [trainer.manifest]
        tensors = [_logical(name, 8192, 8192) for name in needed]
        plan = build_plan(manifests, [(["mlp"], tensors)], needed, strided=frozenset({"down"}))
        fetch = PreparedFetch(plan, manifests, engine, staged=True)
        before = _resident()
        fetch.run_steps(range(1), stall_timeout_s=9, deadline=1e12, cancelled=lambda: False)
        assert plan.total_bytes == 64 * MIB
        assert sum(nbytes for _, nbytes, _ in engine._regions.rows()) < 70 * MIB
        assert _resident() - before < 80 * MIB
        held = dict(fetch.tensors(0))
        assert bool((held["up"][1024:2048] == 3).all())
        assert bool((held["down"][:, 1024:2048] == 3).all())
        assert _resident() - before < 80 * MIB
        fetch.close()
    engine.close()


def _logical(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> LogicalTensor:
    return LogicalTensor(name=name, shape=shape, dtype=dtype)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.core
@pytest.mark.parametrize(
    ("how", "alike"),
    [
        ("narrow", True),
        ("turned", True),
        ("flat", False),
        ("looks", False),
        ("copied", False),
    ],
)
def test_a_loader_that_minds_strides_is_given_the_whole(how: str, alike: bool) -> None:
    """It flattens the tensor, looks at its strides, or makes it contiguous first."""
    parameter = torch.empty(8, 4, device="meta")

    def load(weights: Any) -> None:
        for _, weight in weights:
            if how == "turned":
                parameter.copy_(weight.t().narrow(0, 4, 4).t())
            elif how == "flat":
                parameter.copy_(weight.view(-1).view(8, 16).narrow(1, 4, 4))
            elif how == "looks" and not weight.is_contiguous():
                parameter.copy_(weight.narrow(1, 8, 4))
            elif how == "copied":
                parameter.copy_(weight.contiguous().narrow(1, 4, 4))
            else:
                parameter.copy_(weight.narrow(1, 4, 4))

    trace = trace_loader({"m.w": parameter}, load, [_logical("w", 8, 16)])
    assert trace.strided == ({"w"} if alike else set())


@pytest.mark.loader
@pytest.mark.parametrize("tp_rank", [0, 7])
def test_a_rank_of_eight_has_an_eighth_of_the_room(tmp_path: Path, tp_rank: int) -> None:
    """Of a real engine's mixture of experts, and its own loader makes of it what it should."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**QWEN), dtype=torch.float32
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    with (
        played_engine() as engine,
        engine.rank(tmp_path, tp_size=8, tp_rank=tp_rank) as rank,
        offered_tensors(tensors) as trainer,
    ):
        said = logical(tensors)
        trace = rank.trace(said)
        needed = needed_boxes(trace, said)
        steps, _ = engine_steps(trace, said, rank.rules)
        whole, room = (
            build_plan([trainer.manifest], steps, needed, strided=strided).largest_step_bytes
            for strided in (None, trace.strided)
        )
        assert any("down_proj" in name for name in trace.strided)
        assert room < whole / 7
        served = rank.model()
        with receiving(PlayedInstaller(rank, served), direct=False) as receiver:
            update(receiver, [trainer])
        found = {name: each.clone() for name, each in served.named_parameters()}
        expected = loaded(served, tensors)
        assert all(same_bits(found[name], expected[name]) for name in expected)
