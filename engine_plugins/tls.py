"""TLS towards an engine: whose word the caller takes, and what the caller shows of itself.

The engine's certificate is always verified, since the admin token goes to whoever answers; there
is no way to turn that off.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import NoReturn

import httpx

from engine_plugins.errors import EngineTlsError, SettingsError

__all__ = ["CaFile", "ClientCert", "tls_context", "tls_error", "tls_hint"]

File = str | os.PathLike[str]
CaFile = File
"""PEM file of the authorities that sign engines' certificates."""
ClientCert = File | tuple[File, File]
"""PEM file of the caller's certificate and key, or one file for each of them."""

_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH, _NOT_YET, _EXPIRED = 62, 64, 9, 10
"""X509_V_ERR_* of OpenSSL, as `SSLCertVerificationError.verify_code` gives them."""


def tls_context(
    url: httpx.URL, ca_file: CaFile | None, client_cert: ClientCert | None
) -> ssl.SSLContext:
    """Make the context of connections to an engine, and read its files now.

    Args:
        url: of the engine; httpx has read its scheme, which people also write as HTTPS.
        ca_file: who signs engines' certificates. None: the authorities that httpx knows, or those
            of `SSL_CERT_FILE`, or else of `SSL_CERT_DIR`.
        client_cert: the caller's own certificate, for engines that demand one.

    Raises:
        SettingsError: a file that cannot be read, holds no PEM, or a key of another certificate;
            files for an engine without TLS.
    """
    if url.scheme != "https":
        if ca_file is not None or client_cert is not None:
            raise SettingsError(
                f"ca_file and client_cert are for TLS, and {url} is without",
                remedy="give the engine as https://host:port, or leave them out",
            )
        # It trusts nobody, and reading the authorities would take tens of ms.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = _known_authorities() if ca_file is None else _authorities(ca_file)
    if client_cert is not None:
        _show(context, client_cert)
    return context


def tls_error(url: str, error: BaseException) -> EngineTlsError | None:
    """Say what TLS failed at; None if the failure has another cause.

    Args:
        url: the engine's base url.
        error: what httpx raised.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    if isinstance(cause, ssl.SSLCertVerificationError):
        return EngineTlsError(
            f"{url} is not trusted, so nothing was sent to it: {cause.verify_message}",
            remedy=_how_to_trust(cause.verify_code),
        )
    seen = (cause.reason or str(cause)).lower().replace("_", " ")
    if cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return EngineTlsError(f"{url} does not speak TLS ({seen})", remedy="give it as http://")
    return EngineTlsError(
        f"{url} broke off the TLS handshake ({seen})",
        remedy="if the engine demands a certificate, pass one that it trusts as client_cert",
    )


def tls_hint(url: str, error: BaseException) -> str:
    """Advice for a connection that was closed, as some servers do where TLS has failed."""
    if not isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError):
        return ""
    if url.startswith("https://"):
        return "; if the engine demands a certificate, pass one that it trusts as client_cert"
    return "; if the engine speaks TLS, give it as https://"


def _how_to_trust(code: int) -> str:
    if code in (_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH):
        return "name the engine as its certificate does, or have one made for this name"
    if code in (_EXPIRED, _NOT_YET):
        return "renew the engine's certificate, or set the clock of this host"
    return "pass the PEM file of the authority that signed the engine's certificate as ca_file"


def _known_authorities() -> ssl.SSLContext:
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one too
        raise SettingsError(
            f"the authorities that SSL_CERT_FILE or SSL_CERT_DIR name cannot be read: {error}",
            remedy="mend or unset them, or pass ca_file",
        ) from error


def _authorities(ca_file: CaFile) -> ssl.SSLContext:
    file = _readable("ca_file", ca_file)
    try:
        return ssl.create_default_context(cafile=file)
    except ssl.SSLError as error:
        raise SettingsError(
            f"ca_file: {file} holds no certificate in PEM form ({error.reason})",
            remedy="give the PEM file of the authority that signed the engine's certificate",
        ) from error


def _show(context: ssl.SSLContext, client_cert: ClientCert) -> None:
    given = client_cert if isinstance(client_cert, tuple) else (client_cert, client_cert)
    if len(given) != 2:
        raise SettingsError(f"client_cert has {len(given)} files", remedy="give (certificate, key)")
    certificate, key = (_readable("client_cert", file) for file in given)
    try:
        # Without a password OpenSSL would ask for one on the terminal, and wait for ever.
        context.load_cert_chain(certificate, key, password=_refuse_encrypted)
    except ssl.SSLError as error:
        what = (
            f"the key in {key} is not that of the certificate in {certificate}"
            if error.reason == "KEY_VALUES_MISMATCH"
            else f"no certificate and key in PEM form are in {certificate} and {key} "
            f"({error.reason or error})"
        )
        raise SettingsError(
            f"client_cert: {what}", remedy="give (certificate, key) as PEM"
        ) from error


def _refuse_encrypted() -> NoReturn:
    raise SettingsError(
        "client_cert: the key is encrypted, and nobody is there to be asked for its password",
        remedy="give the key decrypted, in a file that only this user can read",
    )


def _readable(name: str, file: object) -> Path:
    if not isinstance(file, str | os.PathLike):
        raise SettingsError(
            f"{name} is {file!r}, not the path of a PEM file",
            remedy="an engine's certificate is always verified: give the path of a file",
        )
    path = Path(file)
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise SettingsError(f"{name}: {path} cannot be read ({error.strerror})") from error
