"""The two ends of a feed between engines: one offers what it holds, the other reads it.

What is read lies in the parameters that the feeder serves with. That they were not written
meanwhile its version word says to the reader, and the feeder is asked afterwards whether it still
holds what it offered; until it has said so, the reader stays paused.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import msgspec

from engine_plugins.admin_answers import EngineOffer, UpdateRequest
from engine_plugins.errors import (
    ConflictError,
    EnginePluginError,
    EngineUnreachableError,
    ManifestError,
    PeerError,
    PeerLostError,
    PlanError,
    SourceRevokedError,
    TransferTimeoutError,
    TransportError,
    WeightMismatchError,
)
from engine_plugins.sender.engines import EngineLink, forgot_us
from engine_plugins.weights.contract.report import UpdateReport

__all__ = ["Feeder", "FeederError", "Reader"]

_FEEDERS_FAULT = frozenset(
    error.code
    for error in (
        ManifestError,
        PeerError,
        PeerLostError,
        PlanError,
        SourceRevokedError,
        TransferTimeoutError,
        TransportError,
        WeightMismatchError,
    )
)
"""What a reader's update may fail with because of what it read from."""


class FeederError(Exception):
    """A feed failed, and the reader may be fed by somebody else.

    Attributes:
        error: what was seen.
        gone: whether the feeder itself no longer answers.
        useless: whether it answers and cannot feed anybody.
    """

    def __init__(self, error: EnginePluginError, *, gone: bool, useless: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.gone = gone
        self.useless = useless


class Feeder:
    """One engine's offer of the version that it holds: asked for once, however many read it."""

    def __init__(self, link: EngineLink, version: int) -> None:
        self._link = link
        self._version = version
        self._lock = threading.Lock()
        self._offer: EngineOffer | None = None

    def offer(self) -> EngineOffer:
        """What it offers.

        Raises:
            FeederError: it does not answer, cannot offer, or holds another version.
        """
        with self._lock:
            if self._offer is None:
                try:
                    offer = self._link.client.manifest()
                    self._refuse_other(offer.version, "")
                except EnginePluginError as error:
                    raise _blamed(error) from error
                self._offer = offer
        return self._offer

    def check(self) -> None:
        """See that it still holds what it offered, installed by the same request.

        Raises:
            FeederError: it does not: what was read from it may be a mixture.
        """
        offer = self.offer()
        try:
            now = self._link.client.state()
            self._refuse_other(now.weights.version, " now")
            if now.weights.request_id != offer.request_id or now.state == "updating":
                raise ConflictError(
                    f"{self._link.url} took another update while it fed others",
                    remedy="let one sender at a time update these engines",
                )
        except EnginePluginError as error:
            raise _blamed(error) from error

    def _refuse_other(self, version: int | None, when: str) -> None:
        if version != self._version:
            raise ConflictError(
                f"{self._link.url} holds version {version}{when}, not {self._version}",
                remedy="let one sender at a time update these engines",
            )


class Reader:
    """One engine that takes an update, from one feeder after the other until one has worked.

    Args:
        link: the engine.
        model: facts of the trainer's HF config.
        request: the update, as the caller asked for it.
    """

    def __init__(
        self, link: EngineLink, model: Mapping[str, str | int | bool], request: UpdateRequest
    ) -> None:
        self.link = link
        self._model = model
        self._request = request
        self._attempts = 0
        self._installed = False
        self._serves_after: bool | None = None

    def read_trainer(self, source_ids: Sequence[str]) -> UpdateReport:
        """Update from the trainer's sources.

        Raises:
            EnginePluginError: as `EngineLink.update`.
        """
        again = self._serves_after is not None
        resume = self._serves_after if again else self._request.resume
        return self._update(source_ids, resume=resume, word=self._request.source_word)

    def read(self, feeder: Feeder) -> UpdateReport:
        """Update from another engine.

        Raises:
            FeederError: another feeder may do better. The reader has its old weights, is fenced,
                or is paused with weights that may be a mixture; the next feed mends the latter two.
            EnginePluginError: the reader itself refused or failed.
        """
        offer = feeder.offer()
        if self._serves_after is None:
            wanted = self._request.resume
            paused = self.link.client.state().pause is not None
            self._serves_after = not paused if wanted is None else wanted
        try:
            report = self._read(offer)
        except EnginePluginError as error:
            if error.code not in _FEEDERS_FAULT:
                raise
            feeder.check()
            raise FeederError(error, gone=False, useless=False) from error
        self._installed = True
        feeder.check()
        if self._serves_after:
            self.link.client.resume()
        return report

    def _read(self, offer: EngineOffer) -> UpdateReport:
        def update() -> UpdateReport:
            ids = self.link.publish_peer(offer.manifests)
            return self._update(ids, resume=False, word=offer.source_word)

        try:
            return update()
        except EnginePluginError as error:
            if not forgot_us(error):
                raise
        self.link.forget()  # it restarted
        return update()

    def _update(
        self, source_ids: Sequence[str], *, resume: bool | None, word: int | None
    ) -> UpdateReport:
        """A further attempt is a request of its own: the engine keeps its answer to each."""
        self._attempts += 1
        suffix = f".{self._attempts}" if self._attempts > 1 else ""
        request = msgspec.structs.replace(
            self._request,
            request_id=self._request.request_id + suffix,
            resume=resume,
            force=self._request.force or self._installed,
            source_word=word,
        )
        return self.link.update(source_ids, self._model, request)


def _blamed(error: EnginePluginError) -> FeederError:
    gone = isinstance(error, EngineUnreachableError)
    return FeederError(error, gone=gone, useless=not gone)
