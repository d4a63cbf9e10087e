"""Parameters that a step leaves to the next forward pass to gather."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.sources.megatron.gather import check_gathering, parameter_gathers
from tests.support.overlapping_megatron import DistributedDataParallel

ROOT = Path(__file__).parents[3]
MEGATRON = ROOT / ".venv" / "megatron" / "bin" / "python"


class Float16Module(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def run(chunks: list[nn.Module]) -> None:
    for gather in parameter_gathers(chunks, [0]):
        gather()


def test_every_chunk_is_gathered_once_and_in_order() -> None:
    first, second = (DistributedDataParallel(model()) for _ in range(2))
    order = parameter_gathers([Float16Module(first), second], [0])
    assert [gather.func.__self__ for gather in order] == [first, second]  # type: ignore[attr-defined]
    run([Float16Module(first), second])
    assert first.gathers == second.gathers == [{"force_sync": True}]


def test_a_wrapper_around_the_chunk_is_known_by_its_hooks() -> None:
    """`unwrap_model` is no way round: the parameters are as stale as the wrapped model's."""
    wrapper = DistributedDataParallel(model())
    before = [parameter.clone() for parameter in wrapper.parameters()]
    wrapper.step()
    run([wrapper.module])
    for old, parameter in zip(before, wrapper.parameters(), strict=True):
        assert torch.equal(parameter, 2 * old)


@pytest.mark.parametrize(
    "wrapper",
    [
        DistributedDataParallel(model(), overlap_param_gather=False),
        model(),
    ],
)
def test_what_a_step_gathers_itself_is_left_alone(wrapper: nn.Module) -> None:
    assert parameter_gathers([wrapper], [0]) == []


def test_the_option_does_nothing_where_no_hooks_are_used() -> None:
    """Without the distributed optimizer megatron-core 0.16.1 asserts in start_param_sync."""
    wrapper = DistributedDataParallel(model())
    wrapper.use_forward_hook = False  # type: ignore[assignment]
    assert parameter_gathers([wrapper], [0]) == []


@pytest.mark.parametrize(
    "option", ["reuse_grad_buf_for_mxfp8_param_ag", "use_megatron_fsdp", "use_custom_fsdp"]
)
def test_an_option_that_cannot_be_synced_is_refused(option: str) -> None:
    chunk = Float16Module(DistributedDataParallel(model(), **{option: True}))
    with pytest.raises(UnsupportedError, match=option):
        check_gathering(chunk)


@pytest.mark.parametrize("kind", ["MegatronFSDP", "TorchFullyShardedDataParallel"])
def test_another_sharding_wrapper_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=kind):
        check_gathering(type(kind, (Float16Module,), {})(model()))


def test_a_wrapper_that_cannot_be_told_to_gather_is_refused() -> None:
    chunk = Float16Module(model())
    chunk.ddp_config = SimpleNamespace(overlap_param_gather=True)  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match=r"no start_param_sync"):
        check_gathering(chunk)


def test_offloaded_parameters_are_not_gathered_into() -> None:
    wrapper = DistributedDataParallel(nn.Linear(2, 2))
    next(wrapper.parameters()).untyped_storage().resize_(0)
    with pytest.raises(SourceError, match=r"module\.weight: its memory is offloaded"):
        parameter_gathers([wrapper], [0])
    assert wrapper.gathers == []


@pytest.mark.skipif(not MEGATRON.exists(), reason="Megatron is not here: make setup-megatron")
def test_real_megatron_ranks_are_alike_once_gathered(tmp_path: Path) -> None:
    """Two gloo ranks of megatron-core 0.16.1 and its distributed optimizer, after one step."""
    needed = [ROOT, ROOT / "kernels", ROOT / "examples" / "real_trainers"]
    paths = os.pathsep.join(map(str, needed))
    ranks = [
        subprocess.Popen(
            [
                MEGATRON,
                "-m",
                "tests.support.overlapping_megatron_rank",
                str(rank),
                tmp_path / "meet",
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for place, rank in enumerate(ranks):
        said, _ = rank.communicate(timeout=120)
        told = json.loads(said.splitlines()[-1])
        assert told["stale"] > 0, "Megatron gathered by itself: the test shows nothing"
        assert (told["left"], told["goes_on"]) == (0, True)
        assert f"the ranks [{1 - place}] hold new values" in told["alone"]
