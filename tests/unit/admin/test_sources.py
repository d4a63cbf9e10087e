"""Manifests as files: checked once, found by an id of their content."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import pytest

from engine_plugins.admin import sources as module
from engine_plugins.admin.runtime_files import KeptFile, RuntimeFiles
from engine_plugins.admin.sources import Sources
from engine_plugins.errors import (
    ManifestError,
    ServerFilesError,
    UnknownIdError,
    WeightMismatchError,
)
from engine_plugins.weights.contract.manifest import JSON, MSGPACK, SourceManifest, encode_manifest
from tests.support.model_shapes import QWEN3_30B_A3B, logical_tensors_of
from tests.support.simulated_trainers import SimulatedJob

FACTS: dict[str, str | int | bool] = {"model_type": "qwen3_moe"}


@pytest.fixture
def sources(runtime_dir: Path) -> Sources:
    return Sources(runtime_dir, max_entries=1000)


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
    sources: Sources, runtime_dir: Path, manifests: list[SourceManifest]
) -> None:
    bad = msgspec.structs.replace(manifests[0], agent_metadata=b"else")
    with pytest.raises(ManifestError, match="truncated"):
        sources.add(encode_manifest(bad), MSGPACK)
    assert held(runtime_dir) == set()


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


def held(runtime_dir: Path) -> set[str]:
    return {path.name for path in (runtime_dir / "sources").iterdir()}


def grow_older(runtime_dir: Path, seconds: float, *names: str) -> None:
    for name in names:
        then = (runtime_dir / "sources" / name).stat().st_mtime - seconds
        os.utime(runtime_dir / "sources" / name, (then, then))


def test_what_nobody_uses_expires(
    sources: Sources,
    runtime_dir: Path,
    manifests: list[SourceManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trainer that restarts for ever fills no disk; what a plan is made of stays."""
    planned, connected, unused = (
        sources.add(encode_manifest(each), MSGPACK)
        for each in (*manifests, msgspec.structs.replace(manifests[0], source="restarted"))
    )
    sources.planned("plan-1", [planned], [])
    grow_older(runtime_dir, module.IDLE_S + 1, planned, connected, unused)
    sources.paths([connected], FACTS)
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    sources = Sources(runtime_dir, max_entries=1000)
    new = sources.add(
        encode_manifest(msgspec.structs.replace(manifests[0], source="again")), MSGPACK
    )
    assert held(runtime_dir) == {planned, connected, new}
    with pytest.raises(UnknownIdError, match="no source"):
        sources.paths([unused], FACTS)


def test_the_sources_of_a_dropped_plan_go(
    sources: Sources, runtime_dir: Path, manifests: list[SourceManifest]
) -> None:
    """Unless another plan is made of them, or somebody has published them again since."""
    more = [msgspec.structs.replace(manifests[0], source=f"rank {n}") for n in (2, 3)]
    alone, shared, again, new = (
        sources.add(encode_manifest(each), MSGPACK) for each in (*manifests, *more)
    )
    sources.planned("plan-1", [alone, shared, again], [])
    sources.planned("plan-2", [shared, new], [])
    time.sleep(0.01)
    sources.add(encode_manifest(more[0]), MSGPACK)
    sources.planned("plan-3", [new], ["plan-1", "plan-unknown"])
    assert held(runtime_dir) == {shared, again, new}
    sources.planned("plan-4", [new], ["plan-2", "plan-3"])
    assert held(runtime_dir) == {again, new}


def test_the_bytes_held_are_bounded_by_the_disk(
    sources: Sources,
    runtime_dir: Path,
    manifests: list[SourceManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The longest unused go first, but none of a job that is publishing; then it is refused."""
    bodies = [
        encode_manifest(msgspec.structs.replace(manifests[0], source=f"rank {n}")) for n in range(4)
    ]
    size, room = len(bodies[0]), 4 * 2.5 * len(bodies[0])

    def free(files: RuntimeFiles) -> int:
        return int(room) - sum(each.size for each in files.listed())

    monkeypatch.setattr(RuntimeFiles, "free_bytes", free)
    ids = [sources.add(body, MSGPACK) for body in bodies[:2]]
    with pytest.raises(ServerFilesError, match=f"sources take {2 * size} bytes") as raised:
        sources.add(bodies[2], MSGPACK)
    assert "TMPDIR" in raised.value.remedy
    assert sources.add(bodies[0], MSGPACK) == ids[0], "what is here needs no room"
    grow_older(runtime_dir, module.PUBLISHING_S + 1, *ids)
    ids.append(sources.add(bodies[2], MSGPACK))
    assert held(runtime_dir) == {ids[0], ids[2]}, "the first one had been sent again"


def test_an_add_does_not_look_at_every_file(
    sources: Sources, manifests: list[SourceManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand ranks publish at once: with each a look at all would be a million."""
    looked = list[str]()
    listed = RuntimeFiles.listed

    def watched(files: RuntimeFiles) -> list[KeptFile]:
        looked.append(files.folder.name)
        return listed(files)

    monkeypatch.setattr(RuntimeFiles, "listed", watched)
    for number in range(20):
        one = msgspec.structs.replace(manifests[0], source=f"rank {number}")
        sources.add(encode_manifest(one), MSGPACK)
    assert looked.count("sources") == 1


def test_as_many_ranks_as_a_connect_may_name_can_connect(
    sources: Sources, runtime_dir: Path, manifests: list[SourceManifest]
) -> None:
    """More than 4096, say; each is held and found."""
    ranks = [
        msgspec.structs.replace(manifests[0], source=f"rank {n}", agent=f"agent-{n}")
        for n in range(4200)
    ]
    ids = [sources.add(encode_manifest(each), MSGPACK) for each in ranks[:3]]
    plain = {f"source-{n:024x}": encode_manifest(each) for n, each in enumerate(ranks[3:])}
    files = RuntimeFiles(runtime_dir, "sources")
    for name, body in plain.items():
        files.put(name, body)
    assert len(sources.paths([*ids, *plain], FACTS)) == 4200


def test_a_plan_whose_sources_cannot_be_kept_is_a_plan(
    sources: Sources, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sources expire by time instead; the log says so."""
    (runtime_dir / "plans").write_bytes(b"in the way")
    sources.planned("plan-1", ["source-0"], ["plan-0"])
    assert "plan-1" in caplog.text
