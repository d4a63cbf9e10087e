"""FSDP2 and HSDP trainers, one process for each rank, feed a server from their shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.configurations import DENSE_TP2, MOE_TP2
from tests.support.fsdp_trainer import training
from tests.support.live_models import LiveModel
from tests.support.served import Served


@pytest.mark.parametrize(
    ("served", "mesh", "dtype"),
    [
        pytest.param(MOE_TP2, "3", "bfloat16", id="moe-tp2-uneven"),
        pytest.param(DENSE_TP2, "2x2", "float32", id="dense-tp2-hsdp"),
    ],
    indirect=["served"],
)
def test_a_sharded_model_is_served_as_it_is_after_every_step(
    served: Served, mesh: str, dtype: str, tmp_path: Path
) -> None:
    """Three ranks divide none of the rows evenly, and fused experts are cut between them.

    They hold bfloat16, which the engine wants in its float32.
    """
    first = served.configuration.model
    assert isinstance(first, LiveModel)
    versions = [LiveModel(kind=first.kind, version=each) for each in (1, 0, 1)]
    with training(served, mesh, tmp_path / "rendezvous", *versions, dtype=dtype) as trainer:
        for model in versions:
            report = trainer.report()
            assert served.server.state()["weights"]["version"] == report["version"]
            assert model.wrong_answers(served.server.greedy) == []
            trainer.go_on()
        assert set(trainer.end()) == {0}
