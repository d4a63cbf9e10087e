"""A packed body costs what its sender paid for, not what it unpacks to."""

from __future__ import annotations

import gzip
import subprocess
import sys
import time

import pytest

from engine_plugins.admin.gzip_body import FREE_BYTES, MAX_RATIO, unpacked
from engine_plugins.errors import AdminRequestError, BodyTooLargeError
from engine_plugins.weights.contract.manifest import encode_manifest
from tests.support.model_shapes import QWEN3_30B_A3B, logical_tensors_of
from tests.support.simulated_trainers import SimulatedJob

LIMIT = 256 << 20

BOMB = """
import gzip, resource, sys, time
from engine_plugins.admin.gzip_body import unpacked
from engine_plugins.errors import EnginePluginError
from engine_plugins.weights.contract.manifest import decode_manifest

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

body, before, began = sys.stdin.buffer.read(), peak(), time.monotonic()
try:
    plain = unpacked(body, 256 << 20) if sys.argv[1:] else body
    decode_manifest(plain, max_entries=1_000_000)
except EnginePluginError as error:
    print(error.code, peak() - before, time.monotonic() - began)
"""


def bomb(strings: int) -> bytes:
    """The faults' own: a manifest whose dtypes are fifty million words of one letter."""
    column = b"\xdd" + strings.to_bytes(4, "big") + b"\xa1a" * strings
    return b"\x81\xa7tensors\x81\xa6dtypes" + column


@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
def test_a_bomb_costs_no_more_than_its_body(packed: bool) -> None:
    """50 million strings, which had come to 3.6 GiB and 13 s: within a few bodies and a second."""
    plain = bomb(50_000_000)
    body = gzip.compress(plain, compresslevel=1) if packed else plain
    done = subprocess.run(
        [sys.executable, "-c", BOMB, *(["gzip"] if packed else [])],
        input=body,
        capture_output=True,
        check=True,
        timeout=120,
    )
    code, grown, seconds = done.stdout.decode().split()
    assert code == ("body_too_large" if packed else "bad_manifest")
    allowed = 3 * max(FREE_BYTES, MAX_RATIO * len(body)) if packed else len(body)
    assert int(grown) < allowed
    assert float(seconds) < 2


def test_manifests_of_large_jobs_unpack() -> None:
    """The bound is far above what regular columns of a real model come to."""
    tensors = logical_tensors_of(QWEN3_30B_A3B)
    plain = encode_manifest(SimulatedJob(tensors, ranks=2, tp=2, ep=2).manifests()[0])
    for level in (1, 9):
        body = gzip.compress(plain, compresslevel=level)
        assert len(plain) / len(body) < MAX_RATIO / 3
        assert unpacked(body, LIMIT) == plain


def test_what_packs_too_well_may_be_sent_plain() -> None:
    """The remedy for the ratio is another than the one for the limit; short bodies are free."""
    zeros = gzip.compress(bytes(FREE_BYTES + 1))
    with pytest.raises(BodyTooLargeError, match="unpacks to more than") as caught:
        unpacked(zeros, LIMIT)
    assert caught.value.remedy == "send it plain, without Content-Encoding"
    with pytest.raises(BodyTooLargeError) as caught:
        unpacked(zeros, 1000)
    assert caught.value.remedy == "raise ENGINE_PLUGINS_MAX_MANIFEST_BYTES"
    assert unpacked(gzip.compress(bytes(FREE_BYTES)), LIMIT) == bytes(FREE_BYTES)


def test_the_end_of_a_stream_is_found_out_at_once() -> None:
    """Packed data behind the first stream are not looked at."""
    body = gzip.compress(b"x" * 1000) + gzip.compress(bytes(50 << 20))
    began = time.monotonic()
    assert unpacked(body, LIMIT) == b"x" * 1000
    assert time.monotonic() - began < 1
    with pytest.raises(AdminRequestError, match="before its end mark"):
        unpacked(gzip.compress(b"x" * 1000)[:-1], LIMIT)
