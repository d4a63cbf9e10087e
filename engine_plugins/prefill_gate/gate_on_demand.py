"""The calls about a gate that is not there: nothing of it exists until somebody turns it on.

Its settings can be read and changed meanwhile. A gate that has been made stays, on or off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine_plugins.prefill_gate.decision import OUTCOMES
from engine_plugins.prefill_gate.engine_gate import EngineGate, changed, require_cap
from engine_plugins.prefill_gate.entry import EntryLimits, GateBoard
from engine_plugins.prefill_gate.gate_report import GateReport, GateSettings, LineReport
from engine_plugins.prefill_gate.model_memory import REGIMES
from engine_plugins.settings import Settings

__all__ = ["GateOnDemand"]


class GateOnDemand:
    """What the admin routes ask for, whether there is a gate or not.

    Args:
        settings: of this server; its gate is off.
        make: makes the gate, puts it in front of the scheduler and returns it. With several
            schedulers, all call it at once. It raises where there can be no gate.
        on_host: whether ranks compute in the host's memory, which a cap is compared with here.
        board: where API processes read of the gate; `None` for all schedulers but one.
    """

    def __init__(
        self,
        settings: Settings,
        make: Callable[[Settings], EngineGate],
        *,
        on_host: bool,
        board: GateBoard | None,
    ) -> None:
        self._settings, self._make = settings, make
        self._on_host, self._board = on_host, board
        self._made: EngineGate | None = None
        self._forgets = False
        """Whether what earlier starts have measured is to be forgotten as soon as it is read."""

    @property
    def calls(self) -> Mapping[str, Callable[..., Any]]:
        """By name, as `EngineGate.calls`."""
        return {
            "gate_report": self.report,
            "gate_configure": self.configure,
            "gate_reset": self.reset,
        }

    def report(self) -> GateReport:
        """The gate as it is."""
        return self._absent() if self._made is None else self._made.report()

    def configure(self, changes: dict[str, Any]) -> GateReport:
        """Change settings until the server ends; a mode other than off makes the gate.

        Raises:
            SettingsError: a value that makes no sense here; nothing has changed.
            UnsupportedError: there can be no gate here, and why.
        """
        if self._made is not None:
            return self._made.configure(changes)
        settings = changed(self._settings, changes)
        if self._on_host:  # of a GPU its ranks know the size
            require_cap(settings)
        if settings.prefill_gate != "off":
            made = self._make(settings)
            if self._forgets:
                made.reset()
            self._made = made
        self._settings = settings
        return self._published()

    def reset(self) -> GateReport:
        """Forget measurements, kept ones too, who waits, and counters."""
        if self._made is not None:
            return self._made.reset()
        self._forgets = True
        return self._published()

    def _published(self) -> GateReport:
        report = self.report()
        if self._made is None and self._board is not None:
            nothing = EntryLimits(enforced=False, largest_prompt=0, largest_with_logprobs=0)
            self._board.publish(nothing, report)
        return report

    def _absent(self) -> GateReport:
        settings = self._settings
        unknown = LineReport(
            samples=0,
            intercept_bytes=0,
            slope=1.0,
            proven=False,
            error_p95=0.0,
            margin_bytes=settings.prefill_margin_bytes,
        )
        return GateReport(
            settings=GateSettings(
                mode=settings.prefill_gate,
                cap_bytes=settings.prefill_cap_bytes,
                margin_quantile=settings.prefill_margin_quantile,
                margin_bytes=settings.prefill_margin_bytes,
            ),
            used_bytes=0,
            cap_bytes=0,
            calibration=dict.fromkeys(REGIMES, unknown),
            decisions=dict.fromkeys(OUTCOMES, 0),
            exceeded=0,
            waiting=0,
            longest_wait_s=0.0,
            deferred_s=0.0,
        )
