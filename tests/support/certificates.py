"""A certificate authority for one test, and what it signs, as PEM files."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate

__all__ = ["Authority", "Identity"]

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The files of somebody who can show a certificate."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates; `file` is its own, which its believers are given.

    cryptography is imported late: it is in vLLM's environment, where tests of no engine run.
    """

    def __init__(self, folder: Path, name: str = "ca") -> None:
        from cryptography.hazmat.primitives.asymmetric import ec

        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._signed(self._key, name, own=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(_pem(self._certificate))

    def identity(
        self,
        name: str,
        *,
        host: str = "",
        address: str = "",
        password: str = "",
        days: int = 1,
        self_signed: bool = False,
    ) -> Identity:
        """Somebody with a key of their own, for a host's name or address; days < 0: expired.

        One that is `self_signed` has nothing to do with this authority.
        """
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        files = Identity(
            certificate=self._folder / f"{name}.crt.pem", key=self._folder / f"{name}.key.pem"
        )
        signed = self._signed(key, name, host=host, address=address, days=days, own=self_signed)
        files.certificate.write_bytes(_pem(signed))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(password.encode())
                if password
                else serialization.NoEncryption(),
            )
        )
        return files

    def _signed(
        self,
        key: EllipticCurvePrivateKey,
        name: str,
        *,
        host: str = "",
        address: str = "",
        days: int = 1,
        own: bool = False,
    ) -> Certificate:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.x509.oid import NameOID

        issuer, subject = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)])
            for each in (name if own else self._name, name)
        )
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(x509.BasicConstraints(ca=own, path_length=None), critical=True)
        )
        names: list[x509.GeneralName] = [x509.DNSName(host)] if host else []
        names += [x509.IPAddress(ipaddress.ip_address(address))] if address else []
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(key if own else self._key, hashes.SHA256())


def _pem(certificate: Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)
