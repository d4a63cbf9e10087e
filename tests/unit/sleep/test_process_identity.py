"""A process is told from another one of the same pid, and found from outside its namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from engine_plugins.sleep.process_identity import (
    ProcessIdentity,
    identify,
    local_pid,
    own_namespace,
    presence,
)
from engine_plugins.sleep.process_tree import ProcessTree
from tests.support.fake_nvml import OWN_NAMESPACE


@contextmanager
def sleeper(*before: str) -> Iterator[int]:
    process = subprocess.Popen([*before, "sleep", "60"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def test_this_process_is_itself() -> None:
    me = identify()
    assert (me.pid, me.pid_namespace) == (os.getpid(), own_namespace())
    assert me == identify(os.getpid())
    assert presence(me) == "here"
    assert local_pid(me) == os.getpid()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(me), type=ProcessIdentity) == me


def test_a_process_that_ends_is_gone_and_one_that_never_was_is_an_error() -> None:
    with sleeper() as pid:
        process = identify(pid)
        assert presence(process) == "here"
    assert presence(process) == "gone"
    assert local_pid(process) is None
    with pytest.raises(ProcessLookupError, match=f"no process {pid}"):
        identify(pid)


def test_another_process_with_the_pid_is_not_the_process() -> None:
    """As its start time tells; so does another boot."""
    me = identify()
    earlier = msgspec.structs.replace(me, start_ticks=me.start_ticks - 1)
    assert presence(earlier) == "reused"
    assert local_pid(earlier) is None
    rebooted = msgspec.structs.replace(me, boot_id="another")
    assert presence(rebooted) == "gone"
    assert local_pid(rebooted) is None


def test_a_name_with_spaces_and_parentheses_does_not_shift_the_start_time() -> None:
    rename = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'a) R 1 (b', 0, 0, 0)"
    code = f"{rename}; print(open('/proc/self/comm').read().strip(), flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "a) R 1 (b"
    assert identify(process.pid).start_ticks >= identify().start_ticks
    process.communicate()


def test_a_process_in_a_namespace_below_is_found_by_both_its_pids() -> None:
    """It calls itself 1."""
    command = [
        *OWN_NAMESPACE,
        sys.executable,
        "-c",
        "import msgspec, sys; from engine_plugins.sleep.process_identity import identify;"
        "print(msgspec.json.encode(identify()).decode(), flush=True); sys.stdin.read()",
    ]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    said = worker.stdout.readline()
    if not said:
        pytest.skip(f"no pid namespace can be made: {worker.communicate()[1]}")
    inner = msgspec.json.decode(said, type=ProcessIdentity)
    pid = local_pid(inner)
    assert (inner.pid, inner.namespace_pids) == (1, [1])
    assert pid is not None
    seen = identify(pid)
    assert (seen.pid, seen.start_ticks, seen.pid_namespace) == (
        1,
        inner.start_ticks,
        inner.pid_namespace,
    )
    assert seen.namespace_pids == [pid, 1]
    tree = ProcessTree(inner)
    assert tree.root_pid() == pid
    worker.communicate()
    assert presence(inner) == "out_of_sight"
    assert tree.root_pid() is None


def test_a_process_of_a_tree_is_here_and_others_are_not() -> None:
    tree = ProcessTree(identify())
    assert tree.sight(1) == "foreign"
    assert tree.sight(os.getpid()) == "here"
