"""The sources' boxes as one table, and who is at fault where they do not fit together."""

from __future__ import annotations

import pytest

from engine_plugins.errors import PlanError
from engine_plugins.weights.planning.box_table import TensorTable
from engine_plugins.weights.planning.source_table import source_table
from tests.support.model_shapes import QWEN3_30B_A3B, logical_tensors_of
from tests.support.simulated_trainers import SimulatedJob

TENSORS = logical_tensors_of(QWEN3_30B_A3B | {"num_hidden_layers": 1, "num_experts": 4})


def test_a_rank_that_cuts_otherwise_than_the_others_is_named() -> None:
    """One of four ranks believes in TP 4 where the others have TP 2."""
    job, other = (SimulatedJob(TENSORS, ranks=4, tp=tp, ep=2).manifests() for tp in (2, 4))
    with pytest.raises(PlanError, match=r"embed_tokens.* trainer rank 1 of 4 .* offers \(37984, "):
        source_table([job[0], other[1], *job[2:]], TensorTable(TENSORS))


def test_a_tensor_that_nobody_offers_is_said_to_be_so() -> None:
    job = SimulatedJob(TENSORS[1:], ranks=2, tp=2, ep=2).manifests()
    with pytest.raises(PlanError, match=r"embed_tokens.*nobody offers it"):
        source_table(job, TensorTable(TENSORS))
