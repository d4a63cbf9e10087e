"""What every way to make a `WeightSender` takes, and what of it does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, TypedDict

import torch.distributed as dist

from engine_plugins.admin_answers import Direction
from engine_plugins.errors import SettingsError
from engine_plugins.tls import CaFile, ClientCert
from engine_plugins.weights.sources.forms.block_fp8 import BlockFp8
from engine_plugins.weights.sources.forms.cast import SendDtype
from engine_plugins.weights.transport.base import Transport

__all__ = ["SenderOptions", "Ways"]

MEET_TIMEOUT_S = 60.0
"""For all ranks to make the sender."""


class SenderOptions(TypedDict, total=False):
    """What every way to make a `WeightSender` takes besides."""

    token: str | None
    """The engines' admin token; see `AdminClient`."""
    ca_file: CaFile | None
    """For https engines: the PEM file of the authority that signed their certificates. None: the
    authorities that httpx knows."""
    client_cert: ClientCert | None
    """For https engines that demand one: the PEM file of this trainer's certificate and key, or
    (certificate, key)."""
    transport: Transport | None
    """An open transport, which stays the caller's to close; by default NIXL."""
    process_group: dist.ProcessGroup | None
    """The ranks that take part; by default all."""
    publish: Literal["leading_rank", "each_rank"]
    """`leading_rank` (the default) has the leading rank alone speak with engines: the others need
    neither token nor HTTP route, and their `engines` are not looked at. `each_rank` has every rank
    publish its own manifest."""
    require: Literal["all"] | int
    """How many engines must take a version for `update` to succeed; `all` is the default. The
    report names those that did not, and they are tried again in the next update. Of two phases so
    many must be ready, and the others are left out; a write of a push that fails fails for all."""
    meet_timeout_s: float
    """Seconds for all ranks to make the sender, 60 by default: then those that did not are named.
    Later, ranks wait 30 minutes for each other to come to an update, and warn after this time."""
    progress: bool | None
    """Draw progress bars on stderr of the leading rank; None when it is a terminal."""
    fan_out: int | None
    """Have engines feed each other: the trainer's memory is read by the first one only, and each
    engine that has the version feeds so many others. None has every engine read the trainer's. The
    engines take a version one after the other, down the tree."""
    direction: Direction
    """`pull` (the default) has the engines read the trainer's memory, `push` has every rank write
    into the engines'. A push is always in two phases."""
    register: Literal["once", "every_update"]
    """`once` (the default) keeps the memory registered, and held, between updates, until `release`.
    `every_update` registers it for each update and lets go of it afterwards: for trainers that free
    or unmap it in between and cannot call `release`. It costs a registration and a plan each."""
    only: str | Sequence[str] | None
    """Send the tensors whose checkpoint names match one of these patterns (`model.layers.*`), and
    leave the engines what they have of all others: parts that are not trained, or that this trainer
    does not hold. An engine's module goes whole or not at all. Refused where an engine's weights
    were discarded, are half of an update, or were never loaded. The same on every rank."""
    quantization: Literal["fp8"] | BlockFp8 | None
    """Send matrices as an engine of the model's block-FP8 checkpoint holds them, quantized anew for
    every update into slots of this process's: `fp8` as the config's `quantization_config` says (the
    usual form where it has none), or a `BlockFp8`. The same on every rank."""
    send_dtype: SendDtype
    """`engine` (the default) sends each tensor in the dtype of the engines' parameters, where that
    is not the trainer's: cast anew for every update, into slots of this process's. A torch dtype
    casts all floating tensors to it, but for routers' correction biases. `as_is` (or None) casts
    nothing, and engines refuse what they would not cast themselves. The same on every rank."""
    two_phase: bool | None
    """Have no engine install a version before all are ready to; if one is not, all keep their old
    weights. It costs the memory of mode staged. None: only for a push."""


class Ways(NamedTuple):
    """How a sender's engines come by a version; see `SenderOptions`."""

    direction: Direction
    two_phase: bool
    fan_out: int | None
    register: Literal["once", "every_update"]
    publish: Literal["leading_rank", "each_rank"]
    require: Literal["all"] | int
    meet_timeout_s: float

    @classmethod
    def of(cls, options: SenderOptions) -> Self:
        """As the options say."""
        direction: Direction = options.get("direction", "pull")
        two_phase = options.get("two_phase")
        return cls(
            direction=direction,
            two_phase=direction == "push" if two_phase is None else two_phase,
            fan_out=options.get("fan_out"),
            register=options.get("register", "once"),
            publish=options.get("publish", "leading_rank"),
            require=options.get("require", "all"),
            meet_timeout_s=options.get("meet_timeout_s", MEET_TIMEOUT_S),
        )

    @property
    def first_wait_s(self) -> float:
        """For ranks to meet; what cannot be is refused once they have, so that all hear of it."""
        return self.meet_timeout_s if _above_0(self.meet_timeout_s) else MEET_TIMEOUT_S

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingsError: a fan_out below 1, or together with two phases; a push in one phase; a
                `register`, `publish` or `require` that is none; a meet_timeout_s that is not
                above 0.
        """
        if self.publish not in ("leading_rank", "each_rank"):
            raise SettingsError(
                f"publish is {self.publish!r}", remedy="give 'leading_rank' or 'each_rank'"
            )
        counted = isinstance(self.require, int) and not isinstance(self.require, bool)
        if self.require != "all" and not (counted and self.require >= 1):
            raise SettingsError(
                f"require is {self.require!r}, and says how many engines must take a version",
                remedy="give 'all', or a whole number of at least 1",
            )
        if not _above_0(self.meet_timeout_s):
            raise SettingsError(
                f"meet_timeout_s is {self.meet_timeout_s!r}",
                remedy="give seconds above 0 for all ranks to make the sender",
            )
        if self.register not in ("once", "every_update"):
            raise SettingsError(
                f"register is {self.register!r}, and must be 'once' or 'every_update'"
            )
        if self.fan_out is not None and self.fan_out < 1:
            raise SettingsError(
                f"fan_out is {self.fan_out}: then no engine would feed another",
                remedy="give how many engines each one feeds, or None",
            )
        if self.fan_out is not None and self.two_phase:
            raise SettingsError(
                "with fan_out engines take a version one after the other, so none can wait for "
                "all to be ready",
                remedy="leave out fan_out, or direction push and two_phase",
            )
        if self.direction == "push" and not self.two_phase:
            raise SettingsError(
                "a push is written between prepare and commit", remedy="leave out two_phase=False"
            )

    def needed(self, engines: int) -> int:
        """How many engines must take a version, of so many."""
        return engines if self.require == "all" else int(self.require)

    def check_engines(self, engines: int) -> None:
        """Refuse an update that cannot succeed with so many engines.

        Raises:
            SettingsError: there is none, or fewer than must take it.
        """
        if engines == 0:
            raise SettingsError("there is no engine to update", remedy="add_engines first")
        if engines < self.needed(engines):
            raise SettingsError(
                f"require is {self.require}, and there are {engines} engines",
                remedy="add engines, or make a sender that requires fewer",
            )


def _above_0(seconds: object) -> bool:
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0
