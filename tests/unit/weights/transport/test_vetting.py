"""Hostile metadata costs a child, never the process that meets peers. Over real NIXL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_plugins.errors import PeerError, TransportError
from engine_plugins.weights.transport import vetting
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.nixl_peer import PeerProcess, damaged

ROOT = Path(__file__).parents[4]
LOADS_IT_ITSELF = """
import sys
from engine_plugins.weights.transport.nixl import NixlTransport

metadata = sys.stdin.buffer.read()
NixlTransport("careless").add_peer("peer", metadata)
"""


@pytest.fixture(scope="module")
def peer() -> Iterator[PeerProcess]:
    made = PeerProcess("peer", 1 << 20, 1, {})
    yield made
    made.end()


@pytest.fixture
def transport() -> Iterator[NixlTransport]:
    vetting._through.clear()
    made = NixlTransport(f"vets-{os.getpid()}")
    yield made
    made.close()


def test_metadata_that_crashes_is_refused_by_name_and_the_process_lives(
    transport: NixlTransport, peer: PeerProcess
) -> None:
    hostile = damaged(peer.metadata)
    with pytest.raises(PeerError, match=r"mallory: .* hostile .* ended by SIG(SEGV|ABRT)"):
        transport.vet_peers([("peer", peer.metadata), ("mallory", hostile)])
    transport.vet_peers([("peer", peer.metadata)])
    transport.add_peer("peer", peer.metadata)


def test_without_the_child_the_same_metadata_ends_the_process(peer: PeerProcess) -> None:
    """So there is something to fear. If NIXL is mended, the child can go."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS_IT_ITSELF],
        input=damaged(peer.metadata),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "UCX_HANDLE_ERRORS": "none"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGABRT), done.stderr


def test_one_child_tries_all_and_none_is_tried_twice(
    transport: NixlTransport, peer: PeerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NIXL's own refusals are left to the meeting, which says more."""
    started = []
    real = subprocess.run

    def counted(*args: object, **more: object) -> object:
        started.append(args)
        return real(*args, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", counted)
    peers = [("peer", peer.metadata), ("other", b"garbage"), ("peer", peer.metadata[:-4])]
    for _ in range(3):
        transport.vet_peers(peers)
    assert len(started) == 1
    transport.vet_peers([])
    assert len(started) == 1


def test_a_name_may_not_bring_hostile_metadata_in_behind_good(
    transport: NixlTransport, peer: PeerProcess
) -> None:
    for peers in ([damaged(peer.metadata), peer.metadata], [peer.metadata, damaged(peer.metadata)]):
        with pytest.raises(PeerError, match=r"peer: .* hostile"):
            transport.vet_peers([("peer", each) for each in peers])


def test_a_parser_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the child's own alarm, so that it ends too where the engine was killed meanwhile."""
    child = tmp_path / "child.py"
    script = vetting._CHILD.read_text().replace(
        "agent.loadRemoteMD(metadata)", "__import__('time').sleep(60)"
    )
    assert "sleep" in script
    child.write_text(script.replace('_agent(asked["bindings"])', "None"))
    monkeypatch.setattr(vetting, "_CHILD", child)
    monkeypatch.setattr(vetting, "DEADLINE_S", 1)
    began = time.monotonic()
    with pytest.raises(PeerError, match=r"slow: .* came to no end within 1 s"):
        vetting.vet([("slow", os.urandom(8))], bindings_file="none", net_devices="lo")
    assert time.monotonic() - began < 5


def test_a_child_that_does_not_start_refuses_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded that could not be tried."""
    unseen = [("peer", os.urandom(8))]
    with pytest.raises(TransportError, match="before it came to any") as caught:
        vetting.vet(unseen, bindings_file="/nonexistent.so", net_devices=None)
    assert not isinstance(caught.value, PeerError)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(TransportError, match="no process could be started"):
        vetting.vet(unseen, bindings_file="/nonexistent.so", net_devices=None)
