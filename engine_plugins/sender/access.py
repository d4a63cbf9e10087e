"""What a sender shows to engines, and whom it believes: one for all of its calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from engine_plugins.admin_client import AdminClient
from engine_plugins.sender.options import SenderOptions
from engine_plugins.tls import CaFile, ClientCert

__all__ = ["EngineAccess"]


@dataclass(frozen=True, kw_only=True)
class EngineAccess:
    """Makes clients of engines; printed, it does not show the token.

    Attributes:
        token: the engines' admin token, or None as for `AdminClient`.
        ca_file: who signs the engines' certificates, see `AdminClient`.
        client_cert: the caller's own certificate, see `AdminClient`.
    """

    token: str | None = field(default=None, repr=False)
    ca_file: CaFile | None = None
    client_cert: ClientCert | None = None

    @classmethod
    def of(cls, options: SenderOptions) -> Self:
        """As a sender's options say."""
        return cls(
            token=options.get("token"),
            ca_file=options.get("ca_file"),
            client_cert=options.get("client_cert"),
        )

    def client(self, url: str, *, timeout_s: float = 30.0) -> AdminClient:
        """Make a client of one engine; see `AdminClient`.

        Raises:
            SettingsError: a url, or files for TLS, that cannot be used.
        """
        return AdminClient(
            url,
            token=self.token,
            timeout_s=timeout_s,
            ca_file=self.ca_file,
            client_cert=self.client_cert,
        )
