"""Who an engine is made of, and who of them stands still, said without asking them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import msgspec

from engine_plugins.admin.engine_processes import EngineProcesses, sign_in
from tests.support.signed_in import signed_in
from tests.support.waiting import until


def test_a_stopped_process_is_named_and_so_is_a_dead_one(runtime_dir: Path) -> None:
    """By role, rank and pid; the other one is not."""
    with signed_in(runtime_dir, "worker", 0), signed_in(runtime_dir, "worker", 1) as process:
        processes = EngineProcesses(runtime_dir)
        assert (processes.still(), processes.unusual(), processes.ended()) == ("", "", "")
        process.send_signal(signal.SIGSTOP)
        until(lambda: bool(processes.still()), otherwise=processes.named)
        assert processes.still() == f"worker rank 1 (pid {process.pid}) is stopped"
        assert processes.ended() == ""
        process.send_signal(signal.SIGCONT)
        until(lambda: not processes.still(), otherwise=processes.still)
        process.kill()
        until(
            lambda: bool(processes.ended()), otherwise=processes.named
        )  # a zombie: nobody has waited for it
        assert processes.ended() == f"worker rank 1 (pid {process.pid}) has ended"
        process.wait()
        assert processes.ended() == f"worker rank 1 (pid {process.pid}) has ended"
        assert processes.still() == ""


def test_a_pid_that_is_anothers_now_has_ended(runtime_dir: Path) -> None:
    """Told by when it started."""
    sign_in(runtime_dir, "worker", 0)
    (noted,) = EngineProcesses(runtime_dir).all()
    assert not noted.has_ended
    note = next((runtime_dir / "processes").iterdir())
    assert noted.start_ticks is not None
    other = msgspec.structs.replace(noted, start_ticks=noted.start_ticks - 1)
    note.write_bytes(msgspec.msgpack.encode(other))
    assert f"(pid {os.getpid()}) has ended" in EngineProcesses(runtime_dir).ended()


def test_one_process_with_two_roles_is_named_once(runtime_dir: Path) -> None:
    """With one rank, vLLM's core is its worker."""
    sign_in(runtime_dir, "engine core")
    sign_in(runtime_dir, "worker", 0)
    assert (
        EngineProcesses(runtime_dir).named() == f"engine core and worker rank 0 (pid {os.getpid()})"
    )


def test_they_are_known_when_the_folder_is_gone(runtime_dir: Path) -> None:
    """A runtime directory may vanish under a running server."""
    sign_in(runtime_dir, "scheduler", 0)
    processes = EngineProcesses(runtime_dir)
    known = processes.named()
    shutil.rmtree(runtime_dir)
    assert processes.named() == known
    sign_in(runtime_dir, "scheduler", 1)  # and nobody is kept from starting
