"""A sender's token and TLS files reach each of its calls, and no text."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from engine_plugins.errors import AdminAnswerError, SettingsError
from engine_plugins.sender.access import EngineAccess
from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.certificates import Authority
from tests.support.fake_engine import TOKEN, FakeEngine, served

NAMED = {"w": torch.arange(6.0).reshape(2, 3)}


def test_an_update_over_tls_with_both_sides_certificates(
    transport: InMemoryTransport, tmp_path: Path
) -> None:
    """Engines, those added later, and the progress bar's own calls."""
    authority = Authority(tmp_path)
    me, caller = authority.identity("engine", address="127.0.0.1"), authority.identity("caller")
    with (
        served(FakeEngine(), me, believes=authority.file) as first,
        served(FakeEngine(), me, believes=authority.file) as second,
        WeightSender.from_hf(
            NAMED,
            engines=[first.url],
            transport=transport,
            token=TOKEN,
            ca_file=authority.file,
            client_cert=(caller.certificate, caller.key),
            progress=True,
        ) as sender,
    ):
        sender.add_engines(second.url.replace("https", "HTTPS"))
        first.update_s = 0.5
        sender.update(1)
        for engine in (first, second):
            assert engine.version == 1
            assert torch.equal(engine.weights["w"], NAMED["w"])
        assert first.polls >= 1, "the progress bar asked over TLS too"


def test_an_engine_that_is_not_trusted_is_told_as_that(
    transport: InMemoryTransport, tmp_path: Path
) -> None:
    """Not as one that does not run."""
    authority = Authority(tmp_path)
    with (
        served(FakeEngine(), authority.identity("engine", address="127.0.0.1")) as engine,
        WeightSender.from_hf(NAMED, engines=engine.url, transport=transport, token=TOKEN) as sender,
    ):
        with pytest.raises(EnginesFailedError) as caught:
            sender.update(1)
        failure = caught.value.failures[engine.url]
        assert failure.code == "engine_tls"
        assert "is not trusted" in failure.detail
        assert "as ca_file" in failure.remedy


def test_tls_files_are_checked_when_the_sender_is_made(
    transport: InMemoryTransport, tmp_path: Path
) -> None:
    with (
        pytest.raises(SettingsError, match=r"ca_file: .* cannot be read"),
    ):
        WeightSender.from_hf(
            NAMED,
            engines="https://localhost:1",
            transport=transport,
            token=TOKEN,
            ca_file=tmp_path / "absent.pem",
        )


def test_the_token_shows_in_no_text() -> None:
    access = EngineAccess(token="s3cret-t0ken")
    assert "s3cret-t0ken" not in f"{access} {access!r}"
    with access.client("https://localhost:1") as client:
        assert "s3cret-t0ken" not in f"{client} {client!r}"


def test_the_token_shows_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Of httpx and what it builds on neither, at their most talkative."""
    token = "s3cret-t0ken"
    with (
        caplog.at_level(logging.DEBUG),
        served(FakeEngine()) as engine,
        EngineAccess(token=token).client(engine.url) as client,
        pytest.raises(AdminAnswerError, match="401"),
    ):
        client.state()
    assert "HTTP/1.1 401" in caplog.text, "httpx was heard"
    assert token not in caplog.text
