"""Parts that a server has to do without are told, and cost it nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine_plugins.admin.absent_parts import absent_parts, note_absent
from engine_plugins.admin.runtime_dir import RUNTIME_DIR


def test_what_is_noted_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path))
    assert absent_parts(tmp_path) == {}
    note_absent("memory_baseline", OSError("no such device"))
    note_absent("prefill_gate", "SGLang has no such hook" + "!" * 5000)
    told = absent_parts(tmp_path)
    assert told["memory_baseline"] == "OSError: no such device"
    assert told["prefill_gate"].startswith("SGLang has no such hook")
    assert len(told["prefill_gate"]) <= 2000


@pytest.mark.parametrize("folder", [None, "gone"])
def test_where_nothing_can_be_noted_the_log_has_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    folder: str | None,
) -> None:
    """No server ends because it cannot tell what it lacks."""
    monkeypatch.delenv(RUNTIME_DIR, raising=False)
    if folder is not None:
        monkeypatch.setenv(RUNTIME_DIR, str(tmp_path / folder))
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    note_absent("memory_baseline", OSError("no such device"))
    assert "this engine has no memory_baseline: OSError: no such device" in caplog.text
    assert absent_parts(tmp_path / "gone") == {}
