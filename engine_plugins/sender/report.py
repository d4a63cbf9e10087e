"""What an update of all engines came to: the report, or the error that names who failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import msgspec

from engine_plugins.errors import UpdateFailedError
from engine_plugins.sender.fan_out import TRAINER
from engine_plugins.sender.push_report import PushReport
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport

__all__ = ["EngineFailure", "EnginesFailedError", "SenderReport"]


WORTH_TELLING_S = 0.05


class EngineFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why one engine did not take an update, and what it holds now."""

    code: str
    """The engine's own code (`stale_version`), or that of the error on the way to it."""
    detail: str
    remedy: str = ""
    holds: str
    """Version and state as the engine said them afterwards, for people."""


@dataclass(frozen=True, kw_only=True)
class SenderReport:
    """A version that as many engines as must have installed; the same on every trainer rank.

    Where engines fed each other, `bytes` is still what all of them read together.

    Attributes:
        version: the version installed.
        engines: each engine's own report, by its url.
        plans: each engine's plan as it was when the engine was connected, by its url; which bytes
            took which way in this update is in the engine's report.
        bytes: bytes moved to all engines together.
        seconds: wall seconds of `update()` on the leading rank, after all ranks had arrived.
        gbps: gigabytes (1e9 bytes) per second over all of `seconds`; the engines' own reports
            have the rate on the wire.
        fed_by: whose memory each engine read, by its url: another engine's url, or `trainer`.
        push: of a push, what its writes took; None for a pull.
        failures: engines that did not take the version, where fewer were required.
        slot_bytes: of each trainer rank, bytes that it holds for what is offered in another form
            than the trainer's (cast, quantized or merged) or in another layout (a tensor whose last
            axis is not contiguous, such as Megatron's legacy grouped experts), until `release`.
    """

    version: int
    engines: dict[str, UpdateReport]
    plans: dict[str, PlanSummary]
    bytes: int
    seconds: float
    gbps: float
    fed_by: dict[str, str]
    push: PushReport | None = None
    failures: dict[str, EngineFailure] = field(default_factory=dict)
    slot_bytes: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        version: int,
        engines: dict[str, UpdateReport],
        plans: dict[str, PlanSummary],
        seconds: float,
        *,
        fed_by: Mapping[str, str],
        push: PushReport | None = None,
        failures: Mapping[str, EngineFailure] | None = None,
        slot_bytes: Sequence[int] = (),
    ) -> Self:
        """Sum up the engines' own reports; who is not in `fed_by` was fed by the trainer."""
        moved = sum(report.bytes_moved for report in engines.values())
        return cls(
            version=version,
            engines=engines,
            plans=plans,
            bytes=moved,
            seconds=seconds,
            gbps=moved / max(seconds, 1e-9) / 1e9,
            fed_by=_fed_by(engines, fed_by),
            push=push,
            failures=dict(failures or {}),
            slot_bytes=tuple(slot_bytes),
        )

    @property
    def bytes_given(self) -> dict[str, int]:
        """Bytes of these updates by who gave them: the trainer, and engines that fed others."""
        given: dict[str, int] = {}
        for url, report in self.engines.items():
            feeder = self.fed_by[url]
            given[feeder] = given.get(feeder, 0) + report.bytes_moved
        return given

    @property
    def paused_s(self) -> float:
        """Wall seconds for which generation stood still on the engine that waited longest."""
        return max((report.paused_s for report in self.engines.values()), default=0.0)

    def __str__(self) -> str:
        head = (
            f"version {self.version} on {len(self.engines)} "
            f"engine{'s' if len(self.engines) != 1 else ''} in {self.seconds:.2f} s: "
            f"{self.bytes / 1e6:.1f} MB, {self.gbps:.3g} GB/s"
        )
        lines = [
            f"{url}: {report.bytes_moved / 1e6:.1f} MB in {report.seconds:.2f} s"
            f"{self._wire(report)}, {_mode(report)}, {_waited(report)}"
            f"paused {report.paused_s:.2f} s"
            f"{_ways_in(report)}"
            f"{self._fed(url)}"
            for url, report in self.engines.items()
        ]
        lines += [
            f"not on {url}: {failure.code}: {failure.detail} (it holds {failure.holds})"
            for url, failure in self.failures.items()
        ]
        if self.push is not None:
            head = f"{head}; {self.push}"
        if any(self.slot_bytes):
            head = f"{head}; slots of {_slots(self.slot_bytes)}"
        return "; ".join([head, *lines]) if len(lines) == 1 else "\n  ".join([head, *lines])

    def _wire(self, report: UpdateReport) -> str:
        """An engine that is written to cannot say how fast that was."""
        return "" if self.push is not None else f" ({report.gbps:.3g} GB/s on the wire)"

    def _fed(self, url: str) -> str:
        return "" if self.fed_by[url] == TRAINER else f", fed by {self.fed_by[url]}"


class EnginesFailedError(UpdateFailedError):
    """Some engines did not take an update; the others did, and their reports are here.

    Attributes:
        version: the version that was offered.
        failures: by engine url.
        reports: of the engines that installed the version, by url.
        fed_by: whose memory each of these read; see `SenderReport`.
    """

    def __init__(
        self,
        *,
        version: int,
        failures: Mapping[str, EngineFailure],
        reports: Mapping[str, UpdateReport],
        fed_by: Mapping[str, str],
        require: Literal["all"] | int = "all",
    ) -> None:
        said = "; ".join(
            f"{url}: {failure.code}: {failure.detail} (it holds {failure.holds})"
            + (f" [{failure.remedy}]" if failure.remedy else "")
            for url, failure in failures.items()
        )
        super().__init__(
            f"version {version} failed on {len(failures)} of {len(failures) + len(reports)} "
            f"engines{'' if require == 'all' else f', where {require} must take it'}: {said}",
            remedy="repeat with a higher version, or with force=True for this one, once the "
            "cause is gone; engines that have it take it again",
        )
        self.version = version
        self.failures = dict(failures)
        self.reports = dict(reports)
        self.fed_by = _fed_by(reports, fed_by)


def _slots(sizes: Sequence[int]) -> str:
    most = f"{max(sizes) / 1e6:.1f} MB"
    return most if len(sizes) == 1 else f"up to {most} on each of {len(sizes)} trainer ranks"


def _mode(report: UpdateReport) -> str:
    """What `auto` became, and why."""
    name = report.mode.replace("_", " ")
    return f"{name} ({report.mode_reason})" if report.mode_reason else name


def _waited(report: UpdateReport) -> str:
    """For another call that kept the engine, where that is worth a word."""
    seconds = report.phases.wait_s
    return f"waited {seconds:.2f} s for another call, " if seconds >= WORTH_TELLING_S else ""


def _ways_in(report: UpdateReport) -> str:
    """The bytes of this update by the way that they took into an engine."""
    ways = {
        "direct": report.direct_bytes,
        "staged": report.staged_bytes,
        "through the loader": report.loader_bytes,
    }
    return "".join(f", {size / 1e6:.1f} MB {way}" for way, size in ways.items() if size)


def _fed_by(engines: Iterable[str], told: Mapping[str, str]) -> dict[str, str]:
    """Who fed each of some engines: the trainer, where nothing else is told."""
    return {url: told.get(url, TRAINER) for url in engines}
