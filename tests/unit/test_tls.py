"""The token goes to an engine only once its certificate is verified, however its url is written."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import EngineTlsError, EngineUnreachableError, SettingsError
from engine_plugins.tls import tls_context, tls_error
from tests.support.certificates import Authority, Identity
from tests.support.fake_engine import TOKEN, FakeEngine, served

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def caller(authority: Authority) -> Identity:
    return authority.identity("caller")


@pytest.fixture(scope="module")
def engine(authority: Authority) -> Iterator[FakeEngine]:
    """Speaks TLS with a certificate that only this test's authority vouches for."""
    with served(FakeEngine(), authority.identity("engine", address=HOST)) as running:
        yield running


@pytest.fixture(scope="module")
def demanding(authority: Authority) -> Iterator[FakeEngine]:
    """Demands a certificate of its callers too."""
    identity = authority.identity("demanding", address=HOST)
    with served(FakeEngine(), identity, believes=authority.file) as running:
        yield running


def ask(url: str, **tls: Any) -> str:
    with AdminClient(url, token=TOKEN, **tls) as client:
        return client.state().state


@pytest.mark.parametrize("scheme", ["https", "HTTPS", "Https", "hTTps"])
def test_an_engine_of_an_unknown_authority_is_refused_however_its_scheme_is_written(
    engine: FakeEngine, scheme: str
) -> None:
    """And nothing has been sent, which the engine's count of calls shows."""
    before = engine.polls
    with pytest.raises(EngineTlsError, match=r"is not trusted.*local issuer") as caught:
        ask(engine.url.replace("https", scheme))
    assert engine.polls == before
    assert "as ca_file" in caught.value.remedy


@pytest.mark.parametrize("scheme", ["https", "HTTPS"])
def test_a_self_signed_engine_is_refused_and_trusted_by_its_own_file(
    authority: Authority, scheme: str
) -> None:
    alone = authority.identity("alone", address=HOST, self_signed=True)
    with served(FakeEngine(), alone) as engine:
        url = engine.url.replace("https", scheme)
        for ca_file in (None, authority.file):
            with pytest.raises(EngineTlsError, match=r"is not trusted.*self-signed certificate"):
                ask(url, ca_file=ca_file)
        assert engine.polls == 0
        assert ask(url, ca_file=alone.certificate) == "serving"


@pytest.mark.parametrize("scheme", ["https", "HTTPS"])
def test_an_engine_is_trusted_by_its_authoritys_file(
    engine: FakeEngine, authority: Authority, scheme: str
) -> None:
    url = engine.url.replace("https", scheme)
    assert ask(url, ca_file=authority.file) == "serving"
    assert ask(url, ca_file=str(authority.file)) == "serving"


def test_the_environment_names_authorities_too(
    engine: FakeEngine, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As for every program that uses OpenSSL; a bad one is told when the client is made."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    assert ask(engine.url) == "serving"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "absent.pem"))
    with pytest.raises(SettingsError, match="SSL_CERT_FILE"):
        AdminClient(engine.url)


def test_one_engine_has_one_url_however_it_is_written() -> None:
    """So that it cannot be given twice."""
    with AdminClient("HTTPS://LOCALHOST:8000/admin/v1/") as client:
        assert client.url == "https://localhost:8000"


def test_a_certificate_for_another_host_is_refused(authority: Authority) -> None:
    identity = authority.identity("elsewhere", host="elsewhere.test")
    with served(FakeEngine(), identity) as engine:
        with pytest.raises(EngineTlsError, match=f"not valid for '{HOST}'") as caught:
            ask(engine.url, ca_file=authority.file)
        assert "name the engine as its certificate does" in caught.value.remedy


def test_an_expired_certificate_is_refused(authority: Authority) -> None:
    with served(FakeEngine(), authority.identity("old", address=HOST, days=-1)) as engine:
        with pytest.raises(EngineTlsError, match="certificate has expired") as caught:
            ask(engine.url, ca_file=authority.file)
        assert "renew" in caught.value.remedy


def test_a_client_certificate_is_shown_where_it_is_demanded(
    demanding: FakeEngine, authority: Authority, caller: Identity, tmp_path: Path
) -> None:
    """As two files, and as one."""
    pair = (caller.certificate, caller.key)
    assert ask(demanding.url, ca_file=authority.file, client_cert=pair) == "serving"
    both = tmp_path / "both.pem"
    both.write_bytes(caller.certificate.read_bytes() + caller.key.read_bytes())
    assert ask(demanding.url, ca_file=authority.file, client_cert=both) == "serving"


def test_a_caller_without_a_certificate_is_told_that_one_may_be_demanded(
    demanding: FakeEngine, authority: Authority, tmp_path: Path
) -> None:
    """None, or one of another authority: servers hang up or send an alert, the advice is one."""
    stranger = Authority(tmp_path, "other").identity("stranger")
    for client_cert in (None, (stranger.certificate, stranger.key)):
        before = demanding.polls
        with pytest.raises(EngineUnreachableError) as caught:
            ask(demanding.url, ca_file=authority.file, client_cert=client_cert)
        assert "pass one that it trusts as client_cert" in caught.value.remedy
        assert demanding.polls == before


def test_the_handshake_of_tls_1_2_breaks_off_with_the_same_advice(
    demanding: FakeEngine, authority: Authority
) -> None:
    context = tls_context(httpx.URL(demanding.url), authority.file, None)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.TransportError) as caught:
        httpx.get(demanding.url, verify=context)
    told = tls_error(demanding.url, caught.value)
    assert told is not None
    assert "broke off the TLS handshake" in told.message
    assert "pass one that it trusts as client_cert" in told.remedy


def test_tls_and_plain_http_mixed_up_are_told(engine: FakeEngine) -> None:
    with pytest.raises(EngineUnreachableError) as caught:
        ask(engine.url.replace("https", "http"))
    assert "give it as https://" in caught.value.remedy
    with served(FakeEngine()) as plain:
        with pytest.raises(EngineTlsError, match="does not speak TLS") as refused:
            ask(plain.url.replace("http", "https"))
        assert "http://" in refused.value.remedy


def test_files_that_cannot_be_used_are_refused_at_once(
    authority: Authority, caller: Identity, tmp_path: Path
) -> None:
    """When the client is made, not at the first update."""
    absent, text = tmp_path / "absent.pem", tmp_path / "text.pem"
    text.write_text("no PEM")
    other = authority.identity("another")
    secret = authority.identity("encrypted", password="s3cret")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"ca_file": absent}, "ca_file: .*absent.pem cannot be read .No such file"),
        ({"ca_file": tmp_path}, "ca_file: .* cannot be read .Is a directory"),
        ({"ca_file": text}, "ca_file: .*text.pem holds no certificate in PEM form"),
        ({"ca_file": caller.key}, "holds no certificate in PEM form"),
        ({"ca_file": False}, "ca_file is False, not the path of a PEM file"),
        ({"client_cert": (caller.certificate, absent)}, "client_cert: .*absent.pem cannot be read"),
        ({"client_cert": (text, caller.key)}, "client_cert: no certificate and key in PEM form"),
        ({"client_cert": caller.certificate}, "client_cert: no certificate and key in PEM form"),
        ({"client_cert": (caller.certificate, other.key)}, "is not that of the certificate"),
        ({"client_cert": (secret.certificate, secret.key)}, "client_cert: the key is encrypted"),
        ({"client_cert": (caller.certificate,)}, "client_cert has 1 files"),
    ]
    for tls, said in refused:
        with pytest.raises(SettingsError, match=said):
            AdminClient("https://localhost:1", **tls)


@pytest.mark.parametrize("tls", [{"ca_file": "ca.pem"}, {"client_cert": "me.pem"}])
def test_files_for_an_engine_without_tls_are_refused(tls: dict[str, str]) -> None:
    """Whoever gives them believes that the token is protected."""
    with pytest.raises(SettingsError, match="http://localhost:1 is without"):
        AdminClient("http://localhost:1", **tls)  # type: ignore[arg-type]
