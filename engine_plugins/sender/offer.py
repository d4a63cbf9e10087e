"""What one trainer process offers to engines: its agent, its registered memory, its writes."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from engine_plugins.errors import EnginePluginError, SourceError
from engine_plugins.sender.push import Push
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.peers.agent_network import AgentNetwork
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.transport.base import Transport

__all__ = ["TrainerOffer"]

logger = logging.getLogger(__name__)


class TrainerOffer:
    """Opened and taken back as a whole; its methods are this process's alone.

    Args:
        boxes: gives this process's boxes anew for every update.
        ranks: of the trainer.
        model: facts of the trainer's HF config.
        transport: an open one, which stays the caller's to close; None makes an agent of NIXL.
        partial: whether what is not offered stays as engines have it.
        pushes: whether this process writes to engines.
        let_go: frees what `boxes` holds memory for.
    """

    def __init__(
        self,
        boxes: Callable[[], Sequence[SourceBox]],
        ranks: TrainerRanks,
        *,
        model: Mapping[str, str | int | bool],
        transport: Transport | None,
        partial: bool,
        pushes: bool,
        let_go: Callable[[], None],
    ) -> None:
        self._boxes, self._ranks, self._model = boxes, ranks, model
        self._given, self._pushes = transport, pushes
        self._lets_go = [let_go]
        self._partial = partial
        self._network = AgentNetwork()
        self._owned: Transport | None = None
        self._source: WeightSource | None = None
        self.push: Push | None = None
        """This process's part in a push; None for a pull."""

    def lets_go_of(self, forget: Callable[[], None]) -> None:
        """Have something else that holds on to memory forget it, with all that is released here."""
        self._lets_go.append(forget)

    @property
    def source(self) -> WeightSource:
        """What is registered.

        Raises:
            SourceError: nothing is.
        """
        if self._source is None:
            raise SourceError("nothing is offered now", remedy="update again")
        return self._source

    def reach(self, engines: Iterable[str]) -> None:
        """Have the agent be reachable from engines' networks; one that is not is closed.

        Args:
            engines: hosts, as in the engines' urls.

        Raises:
            SettingsError: see `choose_devices`.
            TransportError: see `choose_devices`.
        """
        lacking = [host for host in engines if self._network.reach(host)]
        if lacking and self._owned is not None:
            logger.info("the agent is made anew, to be reachable from %s", ", ".join(lacking))
            self.close()

    def open(self) -> None:
        """Register the memory, with an agent of its own if no transport was given.

        Raises:
            NotConfiguredError: NIXL is not installed.
            SourceError: tensors that cannot be offered.
            TransportError: memory that cannot be registered.
        """
        transport = self._given
        if transport is None:
            transport = self._owned = self._network.open(_agent_name())
        if self._pushes:
            self.push = Push(self._ranks, transport)
        place = f"trainer rank {self._ranks.global_rank} of {self._ranks.count}"
        self._source = WeightSource(
            self._boxes,
            transport,
            source=f"{place} ({socket.gethostname()}, pid {os.getpid()})",
            global_rank=self._ranks.global_rank,
            model=self._model,
            partial=self._partial,
        )
        self._source.revoke()

    def refresh(self, word: int) -> bool:
        """Offer the weights as they are now, to engines that are told this version word.

        Returns:
            Whether engines must be told anew.

        Raises:
            SourceError: a tensor that can no longer be offered; otherwise as for `open`.
        """
        opened = self._source is None
        if opened:
            self.open()
        moved = self.source.refresh()
        self.source.offer(word)
        return moved or opened

    def withdraw(self) -> None:
        """Let no engine take for whole what it reads from now on. Never raises."""
        if self._source is not None:
            self._source.revoke()

    @contextmanager
    def withdrawn_on_error(self) -> Iterator[None]:
        """Withdraw first of all, whatever ends the block: others may have to be waited for."""
        try:
            yield
        except BaseException:
            self.withdraw()
            raise

    def release(self) -> None:
        """Take every registration back and let go of the memory; `refresh` registers anew."""
        if self.push is not None:
            self.push.close()
        if self._source is not None:
            self._source.release()
        self._let_go()

    def _let_go(self) -> None:
        for forget in self._lets_go:
            forget()

    def close(self) -> None:
        """Take everything back, the agent too: later posts of engines are refused.

        `open` offers anew, under another agent. Repeating it does nothing.
        """
        self.withdraw()  # before memory is freed, and whatever fails below
        push, self.push = self.push, None
        source, self._source = self._source, None
        owned, self._owned = self._owned, None
        if push is not None:
            push.close()
        # The agent ends before the source lets go of memory that it still serves to readers.
        if owned is not None:
            try:
                owned.close()
            except EnginePluginError:
                logger.warning("the agent %s did not close cleanly", owned.agent, exc_info=True)
        if source is not None:
            source.close(agent_closed=owned is not None)
        self._let_go()


def _agent_name() -> str:
    """One that no other process has: a restarted trainer is another peer."""
    return f"trainer-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
