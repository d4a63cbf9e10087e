"""Which process lays out the runtime directory; in real processes, as engines start them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_plugins.admin.runtime_dir import first_process
from engine_plugins.sleep.process_identity import identify

SHOW = (
    "import os; from engine_plugins.admin.runtime_dir import RUNTIME_DIR, ensure_runtime_dir; "
    "ensure_runtime_dir(); "
    "print(os.environ[RUNTIME_DIR])"
)


def _in_a_program_of_its_own(environment: dict[str, str]) -> Path:
    said = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True
    )
    return Path(said.stdout.strip().splitlines()[-1])


def _in_a_child(folder: str) -> None:
    from engine_plugins.admin.runtime_dir import RUNTIME_DIR, ensure_runtime_dir, first_process

    ensure_runtime_dir()
    Path(folder, "seen").write_text(os.environ[RUNTIME_DIR])
    Path(folder, "first").write_text(str(first_process()))


@pytest.fixture
def environment() -> dict[str, str]:
    """This environment without a runtime directory."""
    return {key: value for key, value in os.environ.items() if "ENGINE_PLUGINS" not in key}


def test_a_server_gets_a_directory_and_takes_it_away(environment: dict[str, str]) -> None:
    """Made at start, for this user alone; gone at exit."""
    folder = _in_a_program_of_its_own(environment)
    assert folder.name.startswith("engine-plugins-")
    assert not folder.exists()


def test_a_directory_that_was_merely_inherited_is_another_servers(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """A program that loaded the plugin and then runs a server shares nothing with it."""
    inherited = {
        **environment,
        "ENGINE_PLUGINS_RUNTIME_DIR": str(tmp_path),
        "ENGINE_PLUGINS_RUNTIME_OWNER": str(os.getpid()),
    }
    assert _in_a_program_of_its_own(inherited) != tmp_path
    assert tmp_path.exists()


def test_the_processes_that_a_server_starts_share_its_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The core, workers and API servers come through multiprocessing."""
    monkeypatch.setenv("ENGINE_PLUGINS_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("ENGINE_PLUGINS_RUNTIME_OWNER", str(os.getpid()))
    child = multiprocessing.get_context("spawn").Process(target=_in_a_child, args=(str(tmp_path),))
    child.start()
    child.join(60)
    assert (tmp_path / "seen").read_text() == str(tmp_path)
    assert (tmp_path / "first").read_text() == str(identify())


@pytest.mark.parametrize("owner", ["stranger", "ended", "unset"])
def test_a_pid_that_is_not_above_is_not_the_first_process(
    monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    """A pid may be used again, and names another process in another pid namespace."""
    monkeypatch.delenv("ENGINE_PLUGINS_RUNTIME_OWNER", raising=False)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        if owner == "ended":
            stranger.kill()
            stranger.wait()
        if owner != "unset":
            monkeypatch.setenv("ENGINE_PLUGINS_RUNTIME_OWNER", str(stranger.pid))
        assert first_process() is None
        stranger.kill()


def test_the_first_process_knows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine may run all in one process."""
    monkeypatch.setenv("ENGINE_PLUGINS_RUNTIME_OWNER", str(os.getpid()))
    assert first_process() == identify()
