"""Which process lays out the runtime directory; in real processes, as engines start them."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine_plugins.admin.runtime_dir import ensure_runtime_dir, first_process
from engine_plugins.sleep.process_identity import ProcessIdentity, identify

SHOW = """
import os
from engine_plugins.admin.runtime_dir import ensure_runtime_dir
print(ensure_runtime_dir(), flush=True)
"""
KILLED = SHOW + "os.kill(os.getpid(), 9)"


def _in_a_program_of_its_own(environment: dict[str, str]) -> Path:
    said = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True
    )
    return Path(said.stdout.strip().splitlines()[-1])


def _killed(environment: dict[str, str], *, after: str = "") -> Path:
    """The directory of a server that was killed, once it had done something more."""
    code = SHOW + after + KILLED.removeprefix(SHOW)
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return Path(ended.stdout.strip().splitlines()[-1])


def _a_server(folder: str, name: str) -> None:
    """As an engine's function that serves is run by a launcher."""
    from engine_plugins.admin.runtime_dir import ensure_runtime_dir

    Path(folder, name).write_text(str(ensure_runtime_dir()))


def _in_a_child(folder: str) -> None:
    from engine_plugins.admin.runtime_dir import RUNTIME_DIR, first_process, join_runtime_dir

    join_runtime_dir()
    Path(folder, "seen").write_text(os.environ[RUNTIME_DIR])
    Path(folder, "first").write_text(str(first_process()))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """This environment without a runtime directory, and with a folder of its own for them."""
    plain = {key: value for key, value in os.environ.items() if "ENGINE_PLUGINS" not in key}
    return {**plain, "TMPDIR": str(tmp_path)}


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


def test_two_servers_of_one_launcher_have_a_directory_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its own is that of an engine which it has built itself, or only configured."""
    for name in [each for each in os.environ if each.startswith("ENGINE_PLUGINS")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ENGINE_PLUGINS_RUNTIME_DIR", "")  # so that it is as before afterwards
    monkeypatch.setenv("ENGINE_PLUGINS_RUNTIME_OWNER", "")
    launchers = str(ensure_runtime_dir())
    servers: list[multiprocessing.process.BaseProcess] = [
        multiprocessing.get_context("spawn").Process(target=_a_server, args=(str(tmp_path), "a")),
        multiprocessing.get_context("fork").Process(target=_a_server, args=(str(tmp_path), "b")),
    ]
    for server in servers:
        server.start()
    for server in servers:
        server.join(60)
    folders = [Path((tmp_path / name).read_text()) for name in "ab"]
    assert len({launchers, *map(str, folders)}) == 3
    assert Path(launchers).exists()
    assert not any(each.exists() for each in folders), "each took its own away"


def test_the_next_start_clears_what_a_killed_server_left(environment: dict[str, str]) -> None:
    """Once nobody lives who was of that server, and with what another folder is named alike."""
    left = _killed(environment)
    stranger = left.with_name("engine-plugins-of-mine")
    stranger.mkdir()
    (left.parent / "engine-plugins-link").symlink_to(stranger)
    assert (left / "state.page").exists()
    _in_a_program_of_its_own(environment)
    assert not left.exists()
    assert stranger.exists()


def test_what_a_process_of_a_killed_server_still_holds_is_left(environment: dict[str, str]) -> None:
    """As an API process whose parent was killed."""
    ready = Path(environment["TMPDIR"], "ready")
    lives_on = f"""
if (child := os.fork()) == 0:
    from engine_plugins.admin.runtime_dir import hold_runtime_dir
    import pathlib, signal, sys
    os.setsid(); os.closerange(0, 3); hold_runtime_dir()
    pathlib.Path({str(ready)!r}).write_text(str(os.getpid()))
    signal.pause()
while not os.path.exists({str(ready)!r}): pass
"""
    left = _killed(environment, after=lives_on)
    child = int(ready.read_text())
    try:
        _in_a_program_of_its_own(environment)
        assert left.exists()
    finally:
        os.kill(child, signal.SIGKILL)
    while Path(f"/proc/{child}/fd").exists() and any(Path(f"/proc/{child}/fd").iterdir()):
        pass
    _in_a_program_of_its_own(environment)
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "cleared"),
    [
        ({"pid_namespace": 1}, False),
        ({"boot_id": "another"}, True),
        ({"pid_namespace": 1, "boot_id": "another"}, True),
        (None, False),
    ],
    ids=["other-namespace", "before-a-restart", "both", "nobody-is-noted"],
)
def test_who_cannot_be_seen_from_here_may_be_alive(
    environment: dict[str, str], change: dict[str, Any] | None, cleared: bool
) -> None:
    """Unless the machine has been restarted since."""
    left = _killed(environment)
    note = left / "owner"
    if change is None:
        note.unlink()
    else:
        owner = msgspec.json.decode(note.read_bytes(), type=ProcessIdentity)
        note.write_bytes(msgspec.json.encode(msgspec.structs.replace(owner, **change)))
    _in_a_program_of_its_own(environment)
    assert left.exists() == (not cleared)


def test_a_live_directory_is_locked_for_who_clears_temporary_folders(
    environment: dict[str, str],
) -> None:
    """Systemd-tmpfiles leaves alone what it cannot lock; other servers clear nothing of it."""
    code = SHOW + "input()"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, text=True
    ) as server:
        assert server.stdout is not None
        folder = Path(server.stdout.readline().strip())
        _in_a_program_of_its_own(environment)
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        server.communicate("\n")
    assert not folder.exists()


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
