"""The client says exactly what an engine answered, and never hides which engine it was."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import (
    AdminAnswerError,
    EngineUnreachableError,
    NotConfiguredError,
    SettingsError,
)
from tests.support.fake_engine import TOKEN, FakeEngine, Refused, served

VARIABLES = ("ENGINE_PLUGINS_ADMIN_TOKEN", "ENGINE_PLUGINS_ADMIN_TOKEN_FILE")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeEngine]:
    with served(FakeEngine()) as engine:
        yield engine


@pytest.fixture
def engine(server: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    server.restart()
    server.refuse.clear()
    return server


def test_every_route_is_typed(engine: FakeEngine) -> None:
    """Answers become structs; fields of later releases are ignored."""
    with AdminClient(engine.url + "/admin/v1/", token=TOKEN) as client:
        assert client.url == engine.url
        assert client.state().state == "serving"
        assert client.state().weights.version is None
        assert client.pause("wait", timeout_s=1.0).update is None
        assert client.resume().state == "serving"
        assert client.flush(multimodal_cache=False) == ["prefix_cache"]
        assert client.weights().history == []


def test_a_problem_is_told_as_the_engine_told_it(engine: FakeEngine) -> None:
    """Status, code, state, detail and remedy are attributes; the text has url and detail."""
    with AdminClient(engine.url, token=TOKEN) as client:
        with pytest.raises(AdminAnswerError) as caught:
            client.connect(["src-nobody"])
        error = caught.value
        assert (error.status, error.code, error.state) == (404, "unknown_id", "serving")
        assert (error.detail, error.remedy) == ("no source ['src-nobody']", "mend unknown_id")
        assert engine.url in str(error)
        with pytest.raises(AdminAnswerError, match="404 unknown_id, serving: no plan x"):
            client.update(UpdateRequest(plan_id="x", version=1, request_id="r"))
        with pytest.raises(AdminAnswerError, match="422 malformed_request"):
            client.put_source(b"garbage")


def test_a_server_without_admin_routes_is_named(engine: FakeEngine) -> None:
    """A stock engine answers 404 with a body of its own."""
    with AdminClient(engine.url + "/elsewhere", token=TOKEN) as client:
        with pytest.raises(AdminAnswerError) as caught:
            client.state()
        assert "no admin routes" in caught.value.remedy


def test_an_answer_of_another_shape_is_an_error(engine: FakeEngine) -> None:
    """Success with a body that is not as agreed is not success."""
    engine.refuse["/weights"] = Refused(200, "odd", "no")
    with AdminClient(engine.url, token=TOKEN) as client:
        assert client.weights().version is None
        engine.refuse["/weights/sources"] = Refused(200, "odd", "no")
        with pytest.raises(AdminAnswerError, match="unreadable_answer"):
            client.put_source(b"x")


def test_a_dead_engine_is_named() -> None:
    """Nothing listens: the error has the url and says what to check."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with AdminClient(url, token=TOKEN) as client, pytest.raises(EngineUnreachableError) as seen:
            client.state()
    assert url in str(seen.value)


def test_a_silent_engine_is_named_after_its_deadline() -> None:
    """It accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            AdminClient(url, token=TOKEN, timeout_s=0.2) as client,
            pytest.raises(EngineUnreachableError, match=r"within 0\.2 s"),
        ):
            client.state()


def test_a_call_that_may_be_repeated_is_sent_again_when_its_answer_is_lost() -> None:
    """A proxy gave up, or the connection broke: the engine may have done the work."""
    for call, sent in (("pause", 2), ("resume", 2), ("sleep", 2), ("wake", 2), ("flush", 1)):
        with socket.create_server(("127.0.0.1", 0)) as server:
            asked: list[bytes] = []

            def serve(server: socket.socket = server, asked: list[bytes] = asked) -> None:
                for _ in range(2):
                    with suppress(OSError), server.accept()[0] as connection:
                        asked.append(connection.recv(1 << 16).split(b" HTTP", 1)[0])

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            with (
                AdminClient(url, token=TOKEN, timeout_s=5) as client,
                pytest.raises(EngineUnreachableError, match=f"/{call}: "),
            ):
                getattr(client, call)()
            assert asked == [f"POST /admin/v1/{call}".encode()] * sent


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://u:p@host", "http://h:99999"]
)
def test_what_is_no_engine_url_is_refused(url: str) -> None:
    """And a password in a url does not end up in a log."""
    with pytest.raises(SettingsError) as caught:
        AdminClient(url)
    assert "p@" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("http://engine:8000/v1", "give http://engine:8000"),
        ("https://engine/v1/", "give https://engine"),
        ("http://gateway/engine-3/v1", "give http://gateway/engine-3"),
    ],
)
def test_an_openai_base_url_is_refused_with_the_right_one(url: str, instead: str) -> None:
    """It would be a 404, and with a key of the engine's a 401, of another route."""
    with pytest.raises(SettingsError, match="/v1 does not belong there") as caught:
        AdminClient(url)
    assert caught.value.remedy == instead


@pytest.mark.parametrize("path", ["", "/", "/admin/v1", "/admin/v1/", "/engine-3"])
def test_other_paths_of_an_engine_are_welcome(path: str) -> None:
    """The whole url of the contract too: it is what the docs name."""
    with AdminClient(f"http://engine:8000{path}") as client:
        assert client.url.removesuffix("/engine-3") == "http://engine:8000"


def test_tokens_come_from_the_argument_the_variable_or_the_file(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In this order; the file has one token per scope and is read for every request."""
    with AdminClient(engine.url) as client:
        with pytest.raises(NotConfiguredError, match="no admin token"):
            client.state()
        tokens = tmp_path / "tokens"
        tokens.write_text(f"# who may what\nread {TOKEN}\ncontrol wrong\n")
        monkeypatch.setenv("ENGINE_PLUGINS_ADMIN_TOKEN_FILE", str(tokens))
        assert client.state().state == "serving"
        with pytest.raises(AdminAnswerError, match="401 unauthorized"):
            client.resume()
        tokens.write_text(f"control {TOKEN}\n")
        assert client.resume().state == "serving"
        with pytest.raises(NotConfiguredError):
            client.state()
        monkeypatch.setenv("ENGINE_PLUGINS_ADMIN_TOKEN", TOKEN)
        assert client.state().state == "serving"
    with (
        AdminClient(engine.url, token="wrong") as client,
        pytest.raises(AdminAnswerError, match="401 unauthorized"),
    ):
        client.state()
    with AdminClient(engine.url, token="two words") as client, pytest.raises(SettingsError):
        client.state()
