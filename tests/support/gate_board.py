"""What a scheduler tells the API processes of a gate that has measured nothing."""

from __future__ import annotations

from pathlib import Path

from engine_plugins.prefill_gate.entry import EntryKind, GateBoard, entry_limits
from engine_plugins.prefill_gate.gate import PrefillGate
from engine_plugins.settings import Settings
from tests.support.simulated_steps import a_memory

__all__ = ["publish_gate"]


def publish_gate(runtime_dir: Path, mode: str) -> None:
    """As a scheduler does when it starts with its gate in this mode."""
    gate = PrefillGate(a_memory(), Settings(prefill_gate=mode), smallest_chunk=64)
    kind = EntryKind(max_prompt=64, divisible=True, logprobs_held_bytes=20)
    GateBoard(runtime_dir).publish(entry_limits(gate, kind), gate.report())
