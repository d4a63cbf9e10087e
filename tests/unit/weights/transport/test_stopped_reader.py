"""A reader that is stopped in the middle and goes on after the trainer has written: refused.

Over NIXL between processes. On both wires reads of memory that was given up succeed, and bring
the new bytes: only the version word tells.
"""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from engine_plugins.weights.contract.version_word import new_word
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.rank_process import RankProcess
from tests.support.reading_rank import filled

WIRES = {"cma": {}, "tcp": {"UCX_TLS": "tcp"}}


@pytest.fixture(params=list(WIRES))
def reader(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RankProcess]:
    """An engine rank in a process of its own, on a wire; this process uses the same."""
    monkeypatch.delenv("UCX_TLS", raising=False)
    for name, value in WIRES[request.param].items():
        monkeypatch.setenv(name, value)
    with closing(NixlTransport("seen")):
        process = RankProcess("tests.support.reading_rank", environment=WIRES[request.param])
    hear(process)
    yield process
    os.kill(process.pid, signal.SIGCONT)
    process.end()


def hear(reader: RankProcess) -> dict[str, Any]:
    """The next line that is the reader's own."""
    while not (line := reader.stdout.readline()).startswith("SAYS "):
        assert line, "the reader ended"
    said: dict[str, Any] = json.loads(line.removeprefix("SAYS "))
    return said


def stopped_in_the_middle(reader: RankProcess, source: WeightSource, word: int) -> None:
    """Have it read, and stop it once bytes have come."""
    manifest = base64.b64encode(source.manifest_bytes).decode()
    asked = {"manifest": manifest, "word": word, "timeout_s": 60.0}
    reader.stdin.write(json.dumps(asked) + "\n")
    reader.stdin.flush()
    assert hear(reader) == {"connected": True}
    said = hear(reader)
    os.kill(reader.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, reader.pid, os.WSTOPPED | os.WNOWAIT)
    assert 0 < said["bytes_done"] < said["bytes_total"]


@pytest.mark.parametrize("way", ["word", "word and agent", "nothing"])
def test_what_was_read_around_a_write_is_refused(reader: RankProcess, way: str) -> None:
    """The word alone is enough; with nothing at all the mixture is taken for a version."""
    tensors = filled(1.0)
    transport = NixlTransport(f"trainer-{os.getpid()}-{way.replace(' ', '-')}")
    source = WeightSource(lambda: hf_boxes(tensors), transport)
    try:
        word = new_word()
        source.offer(word)
        stopped_in_the_middle(reader, source, word)
        if way != "nothing":
            source.revoke()
        if way == "word and agent":
            transport.close()
        for tensor in tensors.values():
            tensor.fill_(2.0)
        os.kill(reader.pid, signal.SIGCONT)
        said, values = hear(reader), hear(reader)["values"]
    finally:
        transport.close()
        source.close(agent_closed=True)
    if way == "nothing":
        assert (said["error"], values) == (None, [1.0, 2.0])
    else:
        assert said["error"] in ("SourceRevokedError", "PeerLostError")
        assert said["error"] == "SourceRevokedError" or way == "word and agent"
        assert (said["wrote"], said["lost"], values) == (False, False, [0.0])
