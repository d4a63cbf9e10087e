"""Whether every scheduler rank of this host is there with all our hooks.

A rank leaves a note when its scheduler knows our message. The first process reads the notes
before it serves: a rank without them would leave every call unanswered.
"""

from __future__ import annotations

import msgspec

from engine_plugins.admin.runtime_dir import shared_state
from engine_plugins.admin.runtime_files import RuntimeFiles
from sglang_ext.versions import SGLANG

__all__ = ["absences", "report_present"]


def report_present(tp_rank: int, missing: list[str]) -> None:
    """Leave this rank's note."""
    _notes().put(f"tp{tp_rank}", msgspec.json.encode(missing))


def absences(tp_size: int) -> list[str]:
    """What is wrong with which rank; empty when the server may start."""
    kept = _notes()
    notes = {rank: kept.get(f"tp{rank}") for rank in range(tp_size)}
    found = []
    for rank, note in notes.items():
        if note is None:
            found.append(
                f"scheduler rank {rank} runs without engine-plugins (is it left out of "
                f"SGLANG_PLUGINS, or is this not SGLang {', '.join(SGLANG.probed)}?)"
            )
        elif hooks := msgspec.json.decode(note, type=list[str]):
            found.append(
                f"SGLang {SGLANG.version} did not take the hooks on {', '.join(hooks)} in "
                f"scheduler rank {rank}; engine-plugins was made for SGLang "
                f"{', '.join(SGLANG.probed)}"
            )
    return found


def _notes() -> RuntimeFiles:
    return RuntimeFiles(shared_state().runtime_dir, "ranks")
