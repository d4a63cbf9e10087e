"""Bad input to a server: a clear 4xx, and weights, version and serving untouched."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from engine_plugins.weights.contract.manifest import (
    SourceManifest,
    encode_manifest,
    numbers,
    packed,
)
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.configurations import DENSE, NEW, OLD, on
from tests.support.engine_server import EngineServer
from tests.support.live_models import LiveModel
from tests.support.nixl_peer import damaged
from tests.support.offers import MSGPACK, Offer, offered
from tests.support.problems import problem
from tests.support.served import Served

pytestmark = on(DENSE)

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def installed(served: Served) -> Iterator[int]:
    """A version that serves; whatever a test sends, it goes on and says what it said."""
    served.restore(OLD)
    if served.server.state()["weights"]["version"] is None:
        served.install(OLD)
    version = served.server.state()["weights"]["version"]
    yield version
    state = served.server.state()
    assert (state["state"], state["weights"]["version"]) == ("serving", version)
    assert served.server.greedy(OLD.prompts()[0]) == OLD.expected()[0]


@pytest.fixture
def offer(served: Served) -> Offer:
    """Good weights of another version."""
    return served.offer(NEW)


def _unknown_name(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.made_up.weight"] = torch.zeros(4, 4)


def _extra_bias(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(128)


def _missing(tensors: Tensors) -> None:
    del tensors[K_PROJ]


def _halved(tensors: Tensors) -> None:
    tensors[K_PROJ] = tensors[K_PROJ][:32].clone()


def _doubled(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.zeros(128)


def _float16(tensors: Tensors) -> None:
    tensors[K_PROJ] = tensors[K_PROJ].half()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_unknown_name, "made_up"),
        (_extra_bias, "q_proj.bias"),
        (_missing, K_PROJ),
        (_halved, "layers.1.self_attn"),
        (_doubled, "model.norm.weight"),
        (_float16, K_PROJ),
    ],
    ids=["unknown-name", "extra-bias", "missing", "halved", "wrong-shape", "wrong-dtype"],
)
def test_tensors_that_do_not_fit_the_model(
    server: EngineServer, spoil: Callable[[Tensors], None], named: str
) -> None:
    """The tensor is named; stock engines take most of these with 200."""
    tensors = NEW.tensors()
    spoil(tensors)
    with offered(server.admin, tensors) as bad:
        assert named in problem(bad.connect(), 422, "weight_mismatch")


def test_a_tensor_that_is_there_twice(offer: Offer) -> None:
    """Two rows of one name contradict each other."""
    manifest = offer.source.manifest
    columns = manifest.tensors
    twice = msgspec.structs.replace(columns, names=[columns.names[0], *columns.names[:-1]])
    bad = msgspec.structs.replace(manifest, tensors=twice)
    assert columns.names[0] in problem(offer.publish(bad), 422, "bad_manifest")


def test_the_manifest_of_another_model(server: EngineServer, offer: Offer) -> None:
    """Facts of the config are compared before any tensor, from the manifest and from the call."""
    facts = {"model_type": "llama", "hidden_size": 4096}
    bad = msgspec.structs.replace(offer.source.manifest, model=facts)
    for answer in (offer.connect(bad), offer.connect(model=facts)):
        detail = problem(answer, 422, "weight_mismatch")
        assert "hidden_size 4096 against this engine's 64" in detail
    with offered(server.admin, LiveModel(kind="qwen2_live", version=0).tensors()) as other:
        problem(other.connect(), 422, "weight_mismatch")


def test_truncated_nixl_metadata(offer: Offer) -> None:
    """Refused by its checksum before NIXL sees it, under which the name would stay poisoned."""
    manifest = offer.source.manifest
    cut = msgspec.structs.replace(manifest, agent_metadata=manifest.agent_metadata[:-20])
    assert "sha256" in problem(offer.publish(cut), 422, "bad_manifest")
    assert offer.connect().status_code == 200, "the same agent is welcome with whole metadata"


def test_garbage_metadata_with_a_right_checksum(offer: Offer) -> None:
    """NIXL itself refuses it; the peer is named."""
    garbage = secrets.token_bytes(300)
    bad = msgspec.structs.replace(
        offer.source.manifest,
        agent=f"garbage-{os.getpid()}",
        agent_metadata=garbage,
        agent_metadata_sha256=hashlib.sha256(garbage).hexdigest(),
    )
    assert "garbage-" in problem(offer.connect(bad), 422, "bad_peer")


def test_metadata_that_ends_the_process_that_loads_it(served: Served, offer: Offer) -> None:
    """A throwaway process dies of it; the engine's own go on, and the peer is named."""
    workers = [worker["pid"] for worker in served.server.state()["workers"]]
    hostile = damaged(offer.source.manifest.agent_metadata)
    bad = msgspec.structs.replace(
        offer.source.manifest,
        agent_metadata=hostile,
        agent_metadata_sha256=hashlib.sha256(hostile).hexdigest(),
    )
    said = problem(offer.connect(bad), 422, "bad_peer")
    assert f"{bad.agent}: " in said
    assert "SIG" in said
    assert [worker["pid"] for worker in served.server.state()["workers"]] == workers
    assert offer.connect().status_code == 200, "the same agent is welcome with whole metadata"


def test_a_source_that_claims_memory_that_is_not_registered(offer: Offer) -> None:
    """Addresses are the peer's word; the transport checks them against what it registered."""
    manifest = offer.source.manifest
    moved = packed(numbers(manifest.regions.addresses) + (1 << 40))
    regions = msgspec.structs.replace(manifest.regions, addresses=moved)
    bad = msgspec.structs.replace(manifest, regions=regions)
    problem(offer.connect(bad), 422, "bad_peer")


@pytest.mark.parametrize("behind", [0, 1, None], ids=["the-same", "the-one-before", "zero"])
def test_a_version_that_is_not_newer(offer: Offer, installed: int, behind: int | None) -> None:
    """409 without force; what is installed stays."""
    version = 0 if behind is None else max(installed - behind, 0)
    detail = problem(offer.update(version), 409, "stale_version")
    assert f"not newer than the installed {installed}" in detail


def test_an_update_that_is_forced_may_go_back(served: Served, installed: int) -> None:
    """Force is the way to repeat a version or to roll back."""
    same = served.offer(OLD)
    assert same.update(max(installed - 1, 0), force=True).status_code == 200
    assert same.update(installed, force=True).status_code == 200


def test_ids_that_nobody_gave_out(server: EngineServer) -> None:
    """404, also for ids that look like paths."""
    for source in ("source-0000", "../state.page", "a/b", "ü", ""):
        response = server.admin.post("/weights/connect", json={"source_ids": [source]})
        problem(response, 404, "unknown_id")
    for plan in ("plan-0000", "../../etc/passwd"):
        body = {"plan_id": plan, "version": 1 << 40}
        problem(server.admin.post("/weights/update", json=body), 404, "unknown_id")


def test_what_this_release_cannot_do_yet_is_said(offer: Offer) -> None:
    """A typed answer, not a silent other thing."""
    problem(offer.update(1 << 40, verify="full"), 422, "unsupported")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/weights/update", b"{not json"),
        ("/weights/update", b'{"version": 8}'),
        ("/weights/update", b'{"plan_id": "p", "version": -1}'),
        ("/weights/update", b'{"plan_id": "p", "version": "eight"}'),
        ("/weights/update", b'{"plan_id": "p", "version": 8, "surprise": 1}'),
        ("/weights/connect", b"[]"),
        ("/weights/connect", b'{"source_ids": []}'),
        ("/pause", b'{"mode": "nap"}'),
        ("/pause", b'{"timeout_s": 0}'),
        ("/flush", b"\xff\xfe"),
    ],
)
def test_bodies_that_make_no_sense(server: EngineServer, route: str, body: bytes) -> None:
    """Malformed is 400, whatever is wrong with it."""
    response = server.admin.post(route, content=body, headers={"content-type": "application/json"})
    problem(response, 400, "malformed_request")


@pytest.mark.parametrize(
    "body",
    [b"", b"garbage", b"\x81\xa1a\x01", secrets.token_bytes(2000)],
    ids=["empty", "text", "another-map", "noise"],
)
def test_manifests_that_are_none(server: EngineServer, body: bytes) -> None:
    """Not msgpack, or msgpack of something else; said to be gzip and not."""
    response = server.admin.post("/weights/sources", content=body, headers=MSGPACK)
    problem(response, 400, "malformed_request")
    packed = {**MSGPACK, "content-encoding": "gzip"}
    response = server.admin.post("/weights/sources", content=body, headers=packed)
    problem(response, 400, "malformed_request")


def test_bodies_over_the_limit(server: EngineServer) -> None:
    """413 by the declared length, and by what really comes when none is declared."""
    problem(server.admin.post("/pause", content=b" " * (2 << 20)), 413, "body_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(3):
            yield b" " * (1 << 20)

    problem(server.admin.post("/pause", content=endless()), 413, "body_too_large")


def test_sources_that_overlap_or_leave_a_gap(server: EngineServer, offer: Offer) -> None:
    """One that holds half of a tensor, and two that each hold all of it, differently cut."""
    name = "model.layers.0.mlp.down_proj.weight"
    half = _halved_box(offer.source.manifest, name)
    assert name in problem(offer.connect(half), 422, "bad_coverage")
    with offered(server.admin, NEW.tensors()) as other:
        ids = [
            answer.json()["source_id"]
            for answer in (offer.publish(), other.publish(_halved_box(other.source.manifest, name)))
        ]
        response = server.admin.post("/weights/connect", json={"source_ids": ids})
        assert name in problem(response, 422, "bad_coverage")


def _halved_box(manifest: SourceManifest, name: str) -> SourceManifest:
    row = manifest.tensors.names.index(name)
    shapes = manifest.table(manifest.boxes.shapes).copy()
    first_axis = manifest.axes - len(manifest.tensor_shape(row))
    shapes[numbers(manifest.boxes.tensors) == row, first_axis] //= 2
    boxes = msgspec.structs.replace(manifest.boxes, shapes=shapes.tobytes())
    return msgspec.structs.replace(manifest, boxes=boxes)


def test_two_sources_of_one_agent(server: EngineServer, offer: Offer) -> None:
    """One manifest for each process."""
    manifest = offer.source.manifest
    again = msgspec.structs.replace(manifest, source="somebody else")
    ids = [offer.publish(each).json()["source_id"] for each in (manifest, again)]
    response = server.admin.post("/weights/connect", json={"source_ids": ids})
    assert "two sources" in problem(response, 422, "weight_mismatch")


def test_a_dead_trainer_is_found_at_connect(server: EngineServer) -> None:
    """Its manifest outlives it; the answer names it within seconds."""
    manifest = _manifest_of_a_closed_agent()
    body = encode_manifest(manifest)
    published = server.admin.post("/weights/sources", content=body, headers=MSGPACK)
    response = server.admin.post(
        "/weights/connect", json={"source_ids": [published.json()["source_id"]]}, timeout=10
    )
    assert manifest.agent in problem(response, 503, "peer_lost")


def _manifest_of_a_closed_agent() -> SourceManifest:
    transport = NixlTransport(f"closed-{os.getpid()}-{secrets.token_hex(4)}")
    source = WeightSource(hf_boxes(NEW.tensors()), transport)
    manifest = source.manifest
    source.close()
    transport.close()
    return manifest
