"""No body is held that is larger than its route's limit."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator, Callable

import httpx
import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send

from engine_plugins.admin.body_limit import BodyLimit
from engine_plugins.admin.sources import MAX_SOURCES
from engine_plugins.settings import Settings
from engine_plugins.weights.contract.manifest import encode_manifest
from engine_plugins.weights.contract.manifest_batch import MAX_BATCH
from tests.support.admin_server import MSGPACK, TOKEN, AdminServer
from tests.support.in_memory_model import hf_tensors
from tests.support.source_ranks import offered_tensors

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]
SMALL = Settings(admin_token=TOKEN, max_body_bytes=1000, max_manifest_bytes=20_000)


async def in_chunks(nbytes: int) -> AsyncIterator[bytes]:
    for _ in range(nbytes // 100):
        yield b" " * 100


async def test_a_body_over_the_limit_is_413_declared_or_not(make_server: MakeServer) -> None:
    """With a Content-Length, and chunked, where the size shows only on the way."""
    server = make_server(settings=SMALL)
    async with server.running():
        for content in (b"{" + b" " * 1000, in_chunks(2000)):
            answer = await server.http.post("/pause", content=content)
            assert answer.status_code == 413
            assert answer.json()["code"] == "body_too_large"
            assert "1000 bytes" in answer.json()["detail"]
            assert answer.headers["connection"] == "close"
        assert (await server.state())["state"] == "serving"
        exact = b'{"mode": "keep"' + b" " * 984 + b"}"
        assert len(exact) == 1000
        assert (await server.http.post("/pause", content=exact)).status_code == 200


async def test_a_connect_may_name_every_rank_of_a_large_trainer(make_server: MakeServer) -> None:
    """As many as the document says; what is over the limit of others is read, and looked at."""
    server = make_server(settings=SMALL)
    async with server.running():
        ids = [f"source-{number:024x}" for number in range(MAX_SOURCES)]
        answer = await server.post("/weights/connect", source_ids=ids)
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_id")
        answer = await server.post("/weights/connect", source_ids=[*ids, "one more"])
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")


async def test_a_declared_size_is_refused_without_reading() -> None:
    """A hundred megabytes announced are a hundred megabytes not received."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("called")

    async def receive() -> Message:
        raise AssertionError("read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"104857600")]}
    await BodyLimit(app, lambda _: 1000)(scope, receive, send)
    assert sent[0]["status"] == 413


async def test_a_client_that_hangs_up_in_its_body_changes_nothing() -> None:
    """Half a body, or none of it, is not an empty body: `POST /pause` has defaults."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("called")

    for chunks in ([], [b'{"mode": ']):
        messages: list[Message] = [
            *({"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks),
            {"type": "http.disconnect"},
        ]

        async def receive(messages: list[Message] = messages) -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            raise AssertionError("nobody listens")

        await BodyLimit(app, lambda _: 1000)({"type": "http", "headers": []}, receive, send)


async def test_manifests_have_a_limit_of_their_own_also_once_unpacked(
    make_server: MakeServer,
) -> None:
    """A small gzip body that unpacks to more than the limit is 413, broken gzip is 400."""
    server = make_server(settings=SMALL)
    gz = {**MSGPACK, "content-encoding": "gzip"}
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        body = encode_manifest(trainer.manifest)
        assert 1000 < len(body) < 20_000
        bomb = gzip.compress(bytes(1 << 20))
        assert len(bomb) < 20_000
        async with server.running():
            ids = set()
            for content, headers, status in (
                (body, MSGPACK, 200),
                (gzip.compress(body), gz, 200),
                (bomb, gz, 413),
                (bytes(20_001), MSGPACK, 413),
                (body, gz, 400),
                (gzip.compress(body)[:-20], gz, 400),
                (gzip.compress(body)[:-4], gz, 400),
                (b"", gz, 400),
            ):
                answer = await server.http.post(
                    "/weights/sources", content=content, headers=headers
                )
                assert answer.status_code == status, answer.text
                if status == 200:
                    ids.add(answer.json()["source_id"])
    assert len(ids) == 1, "the same manifest has the same id, however it was packed"


@pytest.mark.anyio
async def test_many_manifests_in_one_body(make_server: MakeServer) -> None:
    """Plain or packed, each within the bounds of one; an error says of which it is."""
    server = make_server(settings=SMALL)
    with (
        offered_tensors(hf_tensors(seed=1)) as first,
        offered_tensors(hf_tensors(seed=2)) as second,
    ):
        plain = [encode_manifest(each.manifest) for each in (first, second)]
        packed = [gzip.compress(each) for each in plain]
        bomb = gzip.compress(bytes(1 << 20))
        async with server.running():

            async def post(elements: object, kind: str = MSGPACK["content-type"]) -> httpx.Response:
                return await server.http.post(
                    "/weights/sources/batch",
                    content=msgspec.msgpack.encode(elements),
                    headers={"content-type": kind},
                )

            singly = [
                (await server.publish(each.manifest)).json()["source_id"]
                for each in (first, second)
            ]
            for elements in (plain, packed, [plain[0], packed[1]]):
                answer = await post(elements)
                assert answer.status_code == 200, answer.text
                assert answer.json()["source_ids"] == singly
            refused: list[tuple[object, int, str]] = [
                ([plain[0], bomb], 413, "manifest 2 of 2: "),
                ([packed[0], packed[1][:-20]], 400, "manifest 2 of 2: "),
                ([b"garbage", plain[1]], 400, "manifest 1 of 2: "),
                ([b""], 400, "manifest 1 of 1: "),
                ([plain[0], bytes(20_001)], 413, "over this route's limit"),
                ([], 400, "not an array of 1 to"),
                ([b"x"] * (MAX_BATCH + 1), 400, "not an array of 1 to"),
                (plain[0], 400, "not an array of 1 to"),
                (["a text"], 400, "not an array of 1 to"),
                ({"manifests": plain[:1]}, 400, "not an array of 1 to"),
            ]
            for sent, status, words in refused:
                answer = await post(sent)
                assert answer.status_code == status, answer.text
                assert words in answer.json()["detail"], answer.text
            answer = await post(plain[:1], "application/json")
            assert answer.status_code == 400
            assert "content type" in answer.json()["detail"]
