"""Tokens from the environment and from a file that may be anything, or answer nothing."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_plugins.admin import token_book
from engine_plugins.admin.token_book import TokenBook
from engine_plugins.settings import Settings
from tests.support.admin_server import AdminServer

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]
ALL = {"read", "control", "weights"}
LONG = "a-token-of-the-environment"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("read reader-of-the-state\nweights trainer-of-weights\n")
    path.chmod(0o600)
    return path


def write(path: Path, content: bytes) -> None:
    """Whatever was there before."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o600)


def is_taken_away(path: Path) -> None:
    path.unlink()


async def scopes(book: TokenBook, token: bytes) -> set[str] | None:
    """What a request with this token would be allowed."""
    await book.refresh()
    found = book.scopes_of(token)
    return None if found is None else set(found)


@pytest.mark.parametrize(
    "line",
    [
        *(b"read", b"read a b", b"root topsecret", b"READ topsecret", b"read topsecret # mine"),
        *(b"read\xff topsecret", b"\xef\xbb\xbfread topsecret", b"topsecret read"),
    ],
)
async def test_a_bad_line_closes_that_line_only(
    file: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    """The log has its place and not its token; the lines around it hold."""
    write(file, b"# tokens\nread before-the-bad-line\n" + line + b"\ncontrol behind-it-all-16\n")
    book = TokenBook(Settings(admin_token_file=file))
    assert await scopes(book, b"before-the-bad-line") == {"read"}
    assert await scopes(book, b"behind-it-all-16") == {"control"}
    assert await scopes(book, b"topsecret") is None
    (told,) = [each.getMessage() for each in caplog.records]
    assert f"{file}, line 3 is not `scope token` with scope control, read, weights" in told
    assert "topsecret" not in caplog.text


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_closed_file(path: Path) -> None:
    path.write_text("not a token file at all\n" * 3)


@pytest.mark.parametrize("becomes", [is_taken_away, a_directory, a_fifo, a_closed_file])
async def test_the_environments_token_holds_whatever_the_file_is(
    make_server: MakeServer, file: Path, becomes: Callable[[Path], None]
) -> None:
    """Gone in the middle of a rotation, no file, a FIFO: its own tokens are closed meanwhile."""
    server = make_server(settings=Settings(admin_token=LONG, admin_token_file=file))

    async def status(token: str) -> int:
        headers = {"authorization": f"Bearer {token}"}
        return (await server.http.get("/state", headers=headers)).status_code

    async with server.running():
        assert (await status(LONG), await status("reader-of-the-state")) == (200, 200)
        becomes(file)
        began = time.monotonic()
        assert (await status(LONG), await status("reader-of-the-state")) == (200, 401)
        assert time.monotonic() - began < 1
        write(file, b"read reader-of-the-state\n")
        assert (await status(LONG), await status("reader-of-the-state")) == (200, 200)


async def test_what_is_wrong_with_the_file_is_no_strangers_business(
    make_server: MakeServer, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are told that the server is closed; the log says why, once."""
    is_taken_away(file)
    server = make_server(settings=Settings(admin_token_file=file))
    async with server.running():
        for _ in range(3):
            answer = await server.http.get("/state", headers={"authorization": ""})
            assert (answer.status_code, answer.json()["code"]) == (503, "not_configured")
            assert str(file) not in answer.text
    told = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert len(told) == 1
    assert f"{file} cannot be read (No such file or directory)" in told[0]


async def test_a_file_system_that_hangs_holds_nobody_up(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The event loop runs on, one request waits a moment, and the tokens read last hold."""
    monkeypatch.setattr(token_book, "PATIENCE_S", 0.2)
    book = TokenBook(Settings(admin_token=LONG, admin_token_file=file))
    assert await scopes(book, b"reader-of-the-state") == {"read"}
    hangs, look = threading.Event(), token_book._look

    def slowly(path: Path) -> object:
        hangs.wait(30)
        return look(path)

    monkeypatch.setattr(token_book, "_look", slowly)
    write(file, b"read another-reader-now\n")
    turns = 0

    async def ticking() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    ticks = asyncio.create_task(ticking())
    began = time.monotonic()
    found = await asyncio.gather(*(scopes(book, b"reader-of-the-state") for _ in range(10)))
    assert found == [{"read"}] * 10
    assert await scopes(book, LONG.encode()) == ALL
    assert 0.2 <= time.monotonic() - began < 1, "the wait is for one look, not for each request"
    assert turns > 5
    ticks.cancel()
    assert f"{file} has not answered for 0.2 s" in caplog.text
    hangs.set()
    await asyncio.sleep(0.5)
    assert await scopes(book, b"another-reader-now") == {"read"}
    assert await scopes(book, b"reader-of-the-state") is None


async def test_the_first_look_may_hang_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was ever read: the environment's token is all that there is."""
    monkeypatch.setattr(token_book, "PATIENCE_S", 0.05)
    hangs = threading.Event()
    monkeypatch.setattr(token_book, "_look", lambda _: token_book._Look(mode=hangs.wait(30)))
    for settings in (Settings(admin_token_file=file), Settings(admin_token=LONG)):
        book = TokenBook(settings)
        await book.refresh()
        assert book.configured == bool(settings.admin_token)
    hangs.set()


async def test_tokens_that_are_not_utf_8_are_equal_to_themselves_only(
    make_server: MakeServer, file: Path
) -> None:
    """They were compared with what cannot be decoded replaced: by that, all were one."""
    write(file, b"read t\xe9k-of-sixteen-bytes\n")
    book = TokenBook(Settings(admin_token_file=file))
    assert await scopes(book, b"t\xe9k-of-sixteen-bytes") == {"read"}
    server = make_server(settings=Settings(admin_token_file=file))
    async with server.running():
        for token, status in ((b"t\xe9k", 200), (b"t\xfek", 401), ("t\ufffdk".encode(), 401)):
            value = b"Bearer " + token + b"-of-sixteen-bytes"
            answer = await server.http.get("/state", headers=[(b"authorization", value)])
            assert answer.status_code == status, token


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o640, 1), (0o644, 1), (0o666, 1)])
async def test_a_file_that_others_can_read_is_warned_about(
    file: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: int
) -> None:
    """Once, and again when that changes; its tokens hold."""
    os.chmod(file, mode)
    book = TokenBook(Settings(admin_token_file=file))
    for _ in range(3):
        assert await scopes(book, b"reader-of-the-state") == {"read"}
    assert [f"has mode {mode:03o}" in each.getMessage() for each in caplog.records] == [
        True
    ] * warned


async def test_short_tokens_are_warned_about(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the place, not the token; they hold."""
    write(file, b"read x\nread just-long-enough\n")
    book = TokenBook(Settings(admin_token="tiny", admin_token_file=file))
    assert await scopes(book, b"x") == {"read"}
    assert await scopes(book, b"tiny") == ALL
    told = [each.getMessage() for each in caplog.records]
    assert len(told) == 2
    assert told[0].startswith("ENGINE_PLUGINS_ADMIN_TOKEN: a token of 4 characters")
    assert told[1].startswith(f"ENGINE_PLUGINS_ADMIN_TOKEN_FILE: {file}, line 1: a token of 1 char")
    assert "tiny" not in caplog.text


async def test_a_file_without_bounds_is_not_read_to_its_end(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has named the wrong file."""
    write(file, b"read reader-of-the-state\n" + bytes(2 << 20))
    book = TokenBook(Settings(admin_token_file=file))
    assert await scopes(book, b"reader-of-the-state") is None
    assert "has more than 1048576 bytes" in caplog.text


async def test_tokens_are_compared_in_constant_time_and_all_of_them(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a common beginning nor a token's place in the file shows in the time taken."""
    compared: list[tuple[bytes, bytes]] = []

    def spy(ours: bytes, offered: bytes) -> bool:
        compared.append((ours, offered))
        return hmac.compare_digest(ours, offered)

    monkeypatch.setattr(
        token_book, "hmac", type("Spied", (), {"compare_digest": staticmethod(spy)})
    )
    book = TokenBook(Settings(admin_token=LONG, admin_token_file=file))
    for offered in (LONG.encode(), b"reader-of-the-state", b"nobody's"):
        compared.clear()
        await scopes(book, offered)
        assert len(compared) == 3
        assert {each for _, each in compared} == {offered}
