"""Manifests as files: checked once, found by an id of their content."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine_plugins.admin import sources as module
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.sources import Sources
from engine_plugins.errors import ManifestError, UnknownIdError, WeightMismatchError
from engine_plugins.weights.manifest import JSON, MSGPACK, SourceManifest, encode_manifest
from tests.support.model_shapes import QWEN3_30B_A3B, logical_tensors_of
from tests.support.simulated_trainers import SimulatedJob

FACTS: dict[str, str | int | bool] = {"model_type": "qwen3_moe"}


@pytest.fixture
def sources(shared: SharedState) -> Sources:
    return Sources(shared, max_entries=1000)


@pytest.fixture
def manifests() -> list[SourceManifest]:
    """Of two ranks of a model of one layer."""
    tensors = logical_tensors_of(QWEN3_30B_A3B | {"num_hidden_layers": 1})
    return SimulatedJob(tensors, ranks=2, tp=2, ep=2).manifests()


def test_a_manifest_is_found_by_its_content(
    sources: Sources, manifests: list[SourceManifest]
) -> None:
    """Sent as msgpack or as JSON it is the same file, which workers read."""
    ids = [sources.add(encode_manifest(each), MSGPACK) for each in manifests]
    assert sources.add(msgspec.json.encode(manifests[0]), JSON) == ids[0]
    paths = sources.paths([*ids, ids[0]], FACTS)
    assert [path.read_bytes() for path in paths] == [encode_manifest(each) for each in manifests]


@pytest.mark.parametrize("name", ["source-" + "0" * 24, "../state.page", ""])
def test_only_ids_of_ours_name_files(sources: Sources, name: str) -> None:
    """Nobody reads another file by way of an id."""
    with pytest.raises(UnknownIdError, match="no source"):
        sources.paths([name], FACTS)


def test_a_refused_manifest_is_not_kept(
    sources: Sources, shared: SharedState, manifests: list[SourceManifest]
) -> None:
    bad = msgspec.structs.replace(manifests[0], agent_metadata=b"else")
    with pytest.raises(ManifestError, match="truncated"):
        sources.add(encode_manifest(bad), MSGPACK)
    assert shared.names("sources") == []


def test_what_does_not_belong_together_is_named(
    sources: Sources, manifests: list[SourceManifest]
) -> None:
    """Another model, and two manifests of one agent."""
    other = msgspec.structs.replace(manifests[0], model={"model_type": "llama"})
    twin = msgspec.structs.replace(manifests[0], source="its twin")
    with pytest.raises(WeightMismatchError, match=r"trainer rank 0 .*llama"):
        sources.paths([sources.add(encode_manifest(other), MSGPACK)], FACTS)
    ids = [sources.add(encode_manifest(each), MSGPACK) for each in (manifests[0], twin)]
    with pytest.raises(WeightMismatchError, match="two sources say they are the agent"):
        sources.paths(ids, FACTS)


def test_the_oldest_are_forgotten(
    sources: Sources,
    runtime_dir: Path,
    manifests: list[SourceManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trainer that restarts for ever fills no disk."""
    monkeypatch.setattr(module, "MAX_SOURCES", 1)
    ids = [sources.add(encode_manifest(each), MSGPACK) for each in manifests]
    assert [path.name for path in (runtime_dir / "sources").iterdir()] == ids[1:]
