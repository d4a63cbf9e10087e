"""Bad input to a real vLLM server: a clear 4xx, and weights, version and serving untouched."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
import torch

from engine_plugins.weights.manifest import SourceManifest, encode_manifest
from engine_plugins.weights.source import WeightSource
from engine_plugins.weights.torch_source import hf_boxes
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.integration.conftest import StartServer
from tests.support.live_models import LiveModel
from tests.support.offers import MSGPACK, Offer, offered
from tests.support.vllm_server import VllmServer

pytestmark = pytest.mark.engine

SERVED, OTHER = LiveModel(kind="qwen3_live", version=0), LiveModel(kind="qwen3_live", version=1)
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Iterator[VllmServer]:
    """One server for the module, with version 7 installed."""
    with start_server(SERVED) as running, offered(running.admin, SERVED.tensors()) as offer:
        assert offer.update(7).status_code == 200
        yield running


@pytest.fixture(autouse=True)
def untouched(server: VllmServer) -> Iterator[None]:
    """Whatever a test sends, the server goes on with version 7 and says what it said."""
    yield
    state = server.state()
    assert (state["state"], state["weights"]["version"]) == ("serving", 7)
    assert SERVED.wrong_answers(server.greedy) == []


@pytest.fixture
def offer(server: VllmServer) -> Iterator[Offer]:
    """Good weights of another version."""
    with offered(server.admin, OTHER.tensors()) as good:
        yield good


def _problem(response: httpx.Response, status: int, code: str) -> str:
    """Check the answer's form, and give its words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["title"]
    assert body["remedy"], "an error says what to do"
    return str(body["detail"])


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
    server: VllmServer, spoil: Callable[[Tensors], None], named: str
) -> None:
    """The tensor is named; stock vLLM takes a missing k_proj and a halved tensor with 200."""
    tensors = OTHER.tensors()
    spoil(tensors)
    with offered(server.admin, tensors) as bad:
        assert named in _problem(bad.connect(), 422, "weight_mismatch")


def test_a_tensor_that_is_there_twice(offer: Offer) -> None:
    """Two rows of one name contradict each other."""
    manifest = offer.source.manifest
    columns = manifest.tensors
    twice = msgspec.structs.replace(columns, names=[columns.names[0], *columns.names[:-1]])
    bad = msgspec.structs.replace(manifest, tensors=twice)
    assert columns.names[0] in _problem(offer.publish(bad), 422, "bad_manifest")


def test_the_manifest_of_another_model(server: VllmServer, offer: Offer) -> None:
    """Facts of the config are compared before any tensor."""
    facts = {"model_type": "llama", "hidden_size": 4096}
    bad = msgspec.structs.replace(offer.source.manifest, model=facts)
    detail = _problem(offer.connect(bad), 422, "weight_mismatch")
    assert "hidden_size 4096 against this engine's 64" in detail
    with offered(server.admin, LiveModel(kind="qwen2_live", version=0).tensors()) as other:
        _problem(other.connect(), 422, "weight_mismatch")


def test_truncated_nixl_metadata(offer: Offer) -> None:
    """Refused by its checksum before NIXL sees it, under which the name would stay poisoned."""
    manifest = offer.source.manifest
    cut = msgspec.structs.replace(manifest, agent_metadata=manifest.agent_metadata[:-20])
    assert "sha256" in _problem(offer.publish(cut), 422, "bad_manifest")
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
    assert "garbage-" in _problem(offer.connect(bad), 422, "bad_peer")


def test_a_source_that_claims_memory_that_is_not_registered(offer: Offer) -> None:
    """Addresses are the peer's word; the transport checks them against what it registered."""
    manifest = offer.source.manifest
    moved = [address + (1 << 40) for address in manifest.regions.addresses]
    regions = msgspec.structs.replace(manifest.regions, addresses=moved)
    bad = msgspec.structs.replace(manifest, regions=regions)
    _problem(offer.connect(bad), 422, "bad_peer")


@pytest.mark.parametrize("version", [7, 6, 0])
def test_a_version_that_is_not_newer(offer: Offer, version: int) -> None:
    """409 without force; what is installed stays."""
    detail = _problem(offer.update(version), 409, "stale_version")
    assert "not newer than the installed 7" in detail


def test_an_update_that_is_forced_may_go_back(server: VllmServer) -> None:
    """Force is the way to repeat a version or to roll back."""
    with offered(server.admin, SERVED.tensors()) as same:
        assert same.update(6, force=True).status_code == 200
        assert same.update(7).status_code == 200


def test_ids_that_nobody_gave_out(server: VllmServer) -> None:
    """404, also for ids that look like paths."""
    for source in ("source-0000", "../state.page", "a/b", "ü", ""):
        response = server.admin.post("/weights/connect", json={"source_ids": [source]})
        _problem(response, 404, "unknown_id")
    for plan in ("plan-0000", "../../etc/passwd"):
        body = {"plan_id": plan, "version": 8}
        _problem(server.admin.post("/weights/update", json=body), 404, "unknown_id")


def test_what_this_release_cannot_do_yet_is_said(server: VllmServer, offer: Offer) -> None:
    """A typed answer, not a silent other thing."""
    _problem(offer.connect(direction="push"), 422, "unsupported")
    _problem(offer.update(8, verify="full"), 422, "unsupported")


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
def test_bodies_that_make_no_sense(server: VllmServer, route: str, body: bytes) -> None:
    """Malformed is 400, whatever is wrong with it."""
    response = server.admin.post(route, content=body, headers={"content-type": "application/json"})
    _problem(response, 400, "malformed_request")


@pytest.mark.parametrize("body", [b"", b"garbage", b"\x81\xa1a\x01", secrets.token_bytes(2000)])
def test_manifests_that_are_none(server: VllmServer, body: bytes) -> None:
    """Not msgpack, or msgpack of something else."""
    response = server.admin.post("/weights/sources", content=body, headers=MSGPACK)
    _problem(response, 400, "malformed_request")


def test_bodies_over_the_limit(server: VllmServer) -> None:
    """413 by the declared length, and by what really comes when none is declared."""
    _problem(server.admin.post("/pause", content=b" " * (2 << 20)), 413, "body_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(3):
            yield b" " * (1 << 20)

    _problem(server.admin.post("/pause", content=endless()), 413, "body_too_large")


def test_sources_that_overlap_or_leave_a_gap(server: VllmServer) -> None:
    """Two processes that each hold half, and one that holds the wrong half."""
    name = "model.layers.0.mlp.down_proj.weight"
    with offered(server.admin, OTHER.tensors()) as whole:
        manifest = whole.source.manifest
        row = manifest.tensors.names.index(name)
        box = manifest.boxes.tensors.index(row)
        shapes = [list(shape) for shape in manifest.boxes.shapes]
        shapes[box][0] //= 2
        half = msgspec.structs.replace(
            manifest, boxes=msgspec.structs.replace(manifest.boxes, shapes=shapes)
        )
        assert name in _problem(whole.connect(half), 422, "bad_coverage")


def test_two_sources_of_one_agent(server: VllmServer, offer: Offer) -> None:
    """One manifest for each process."""
    manifest = offer.source.manifest
    again = msgspec.structs.replace(manifest, source="somebody else")
    ids = [offer.publish(each).json()["source_id"] for each in (manifest, again)]
    response = server.admin.post("/weights/connect", json={"source_ids": ids})
    assert "two sources" in _problem(response, 422, "weight_mismatch")


def test_a_dead_trainer_is_found_at_connect(server: VllmServer) -> None:
    """Its manifest outlives it; the answer names it within seconds."""
    manifest = _manifest_of_a_closed_agent()
    body = encode_manifest(manifest)
    published = server.admin.post("/weights/sources", content=body, headers=MSGPACK)
    response = server.admin.post(
        "/weights/connect", json={"source_ids": [published.json()["source_id"]]}, timeout=10
    )
    assert manifest.agent in _problem(response, 503, "peer_lost")


def _manifest_of_a_closed_agent() -> SourceManifest:
    transport = NixlTransport(f"closed-{os.getpid()}-{secrets.token_hex(4)}")
    source: Any = WeightSource(hf_boxes(OTHER.tensors()), transport)
    manifest: SourceManifest = source.manifest
    source.close()
    transport.close()
    return manifest
