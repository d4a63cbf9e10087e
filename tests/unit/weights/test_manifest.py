"""A manifest from a peer is either right in every number or refused with a 4xx error."""

from __future__ import annotations

import hashlib
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_plugins.errors import AdminRequestError, ManifestError
from engine_plugins.weights.contract.manifest import (
    JSON,
    MAX_JSON_BYTES,
    MSGPACK,
    SourceManifest,
    decode_manifest,
    encode_manifest,
    packed,
)

LIMIT = 1000
Plain = dict[str, Any]


def plain_manifest() -> Plain:
    """Two tensors: a [4, 6] float32 in two row boxes, and a bfloat16 scalar.

    Its numbers are lists until `wire` packs them.
    """
    metadata = b"\x00agent metadata\xff"
    return {
        "format": 3,
        "source": "trainer rank 0 of 1 (host-a, pid 4711)",
        "transport": "in_memory",
        "agent": "trainer-0",
        "agent_metadata": metadata,
        "agent_metadata_sha256": hashlib.sha256(metadata).hexdigest(),
        "model": {"model_type": "qwen3", "hidden_size": 6, "tie_word_embeddings": True},
        "version_word": 12288,
        "axes": 2,
        "tensors": {
            "names": ["a.weight", "b.scale"],
            "dtypes": ["float32", "bfloat16"],
            "ndims": [2, 0],
            "shapes": [[4, 6], [1, 1]],
        },
        "regions": {"addresses": [4096, 8192], "nbytes": [128, 2], "devices": [-1, -1]},
        "boxes": {
            "tensors": [0, 0, 1],
            "starts": [[0, 0], [2, 0], [0, 0]],
            "shapes": [[2, 6], [2, 6], [1, 1]],
            "regions": [0, 0, 1],
            "offsets_bytes": [0, 72, 0],
            "strides_bytes": [[32, 4], [32, 4], [0, 0]],
        },
    }


def wire(manifest: Plain) -> Plain:
    """The same with its columns of numbers as bytes; numbers that are too large wrap around."""
    tables = {
        name: {
            column: values if column in ("names", "dtypes") else column_bytes(values)
            for column, values in manifest[name].items()
        }
        for name in ("tensors", "regions", "boxes")
    }
    return manifest | tables


def column_bytes(values: object) -> object:
    """Little-endian 64-bit integers, row after row; what is no list stays what it is."""
    if not isinstance(values, list):
        return values
    flat = chain.from_iterable(each if isinstance(each, list) else [each] for each in values)
    return b"".join(struct.pack("<Q", value % 2**64) for value in flat)


def decode(manifest: Plain, *, max_entries: int = LIMIT) -> SourceManifest:
    body = msgspec.msgpack.encode(wire(manifest))
    return decode_manifest(body, content_type=MSGPACK, max_entries=max_entries)


def test_a_manifest_survives_msgpack_and_json() -> None:
    """What is encoded is what is decoded, and JSON says the same."""
    manifest = decode(plain_manifest())
    assert decode_manifest(encode_manifest(manifest), max_entries=LIMIT) == manifest
    body = msgspec.json.encode(manifest)
    kind = "Application/JSON; charset=utf-8"
    assert decode_manifest(body, content_type=kind, max_entries=LIMIT) == manifest


def test_where_the_source_is_may_be_said() -> None:
    """Host and rank serve the choice among replicas; manifests without them stay valid."""
    silent = decode(plain_manifest())
    assert (silent.host, silent.global_rank) == ("", None)
    said = decode({**plain_manifest(), "host": "host-a", "global_rank": 7})
    assert (said.host, said.global_rank) == ("host-a", 7)
    with pytest.raises(ManifestError, match="host"):
        decode({**plain_manifest(), "host": "host\n"})


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", MSGPACK),
        (b"\xc1garbage", MSGPACK),
        (b"\x91" * 100_000, MSGPACK),
        (b"\x81\xa1x" + b"\x91" * 100_000, MSGPACK),
        (b"[" * 100_000, JSON),
        (b"{}", JSON),
        (b"null", JSON),
        (b'{"format": 3, "source": "\xff"}', JSON),
        (encode_manifest(decode(plain_manifest()))[:-7], MSGPACK),
        (encode_manifest(decode(plain_manifest())), JSON),
        (encode_manifest(decode(plain_manifest())), "application/x-python-pickle"),
    ],
)
def test_what_is_no_manifest_is_malformed(body: bytes, kind: str) -> None:
    """Garbage, truncation, wrong content types and bottomless nesting are 400s."""
    with pytest.raises(AdminRequestError):
        decode_manifest(body, content_type=kind, max_entries=LIMIT)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(format=1),
        lambda m: m.update(axes=0),
        lambda m: m.update(axes=9),
        lambda m: m.update(extra=1),
        lambda m: m.pop("agent"),
        lambda m: m.update(global_rank=-1),
        lambda m: m.update(host=None),
        lambda m: m["boxes"].update(tensors=0),
        lambda m: m["boxes"].update(tensors="0 0 1"),
        lambda m: m["model"].update(nested={}),
    ],
)
def test_a_wrong_type_or_field_is_malformed(edit: Callable[[Plain], None]) -> None:
    """Missing and unknown fields, floats for integers, another format: 400."""
    manifest = plain_manifest()
    edit(manifest)
    with pytest.raises(AdminRequestError):
        decode(manifest)


def put(table: str, column: str, row: int, value: object) -> Callable[[Plain], None]:
    def edit(manifest: Plain) -> None:
        manifest[table][column][row] = value

    return edit


CONTRADICTIONS: dict[str, tuple[Callable[[Plain], None], str]] = {
    "dtype": (put("tensors", "dtypes", 1, "float31"), "unknown dtype 'float31'"),
    "name twice": (put("tensors", "names", 1, "a.weight"), "a.weight is listed twice"),
    "name empty": (put("tensors", "names", 1, ""), "tensor name ''"),
    "name control": (put("tensors", "names", 1, "a\nb"), "not printable"),
    "huge tensor": (put("tensors", "shapes", 0, [2**62, 2**62]), "too large"),
    "huge axis": (put("tensors", "shapes", 0, [2**63, 1]), "outside 0"),
    "too many axes": (put("tensors", "ndims", 0, 3), r"ndims\[0\] is 3, the tables have 2 axes"),
    "foreign axis": (put("tensors", "shapes", 1, [2, 1]), "before its own must be 1"),
    "negative axis": (put("tensors", "shapes", 0, [-4, 6]), r"tensors.shapes .* is -4"),
    "outside": (put("boxes", "starts", 1, [3, 0]), "outside its tensor"),
    "too wide": (put("boxes", "shapes", 1, [2, 7]), "outside its tensor"),
    "wrapping start": (put("boxes", "starts", 1, [2**63 - 1, 0]), "outside its tensor"),
    "axes": (put("boxes", "starts", 1, [0]), "boxes.starts has 40 bytes, .* rows of 2 numbers"),
    "scalar elsewhere": (put("boxes", "starts", 2, [0, 1]), r"at \(\) of shape \(\) lies outside"),
    "empty box": (put("boxes", "shapes", 1, [0, 6]), "empty"),
    "tensor row": (put("boxes", "tensors", 2, 2), r"boxes.tensors\[2\] is 2, there are 2"),
    "region row": (put("boxes", "regions", 2, 9), r"boxes.regions\[2\] is 9"),
    "negative row": (put("boxes", "regions", 2, -1), r"boxes.regions\[2\] is -1"),
    "negative offset": (put("boxes", "offsets_bytes", 1, -4), "is -4"),
    "huge offset": (put("boxes", "offsets_bytes", 1, 2**64 - 1), "outside 0"),
    "far offset": (put("boxes", "offsets_bytes", 1, 2**63 - 1), "not registered"),
    "negative stride": (put("boxes", "strides_bytes", 1, [-32, 4]), "is -32"),
    "reach": (put("boxes", "offsets_bytes", 1, 76), "reaches outside its region of 128"),
    "stride reach": (put("boxes", "strides_bytes", 0, [108, 4]), "reaches outside"),
    "wrapping stride": (put("boxes", "strides_bytes", 0, [2**63 - 1, 4]), "reaches outside"),
    "last axis": (put("boxes", "strides_bytes", 0, [32, 8]), "8 bytes on its last axis"),
    "region size": (put("regions", "nbytes", 1, 0), "0 bytes at address 8192"),
    "null region": (put("regions", "addresses", 1, 0), "at address 0"),
    "region wraps": (put("regions", "nbytes", 0, 2**63 - 1), "wraps around"),
    "region huge": (put("regions", "nbytes", 0, 2**63), "outside 0"),
    "device": (put("regions", "devices", 0, -2), "is -2, outside -1"),
    "big device": (put("regions", "devices", 0, 5000), "on device 5000"),
    "overlap": (put("regions", "addresses", 1, 4096 + 127), "0 and 1 overlap"),
    "columns": (lambda m: m["boxes"]["regions"].append(0), "differ in length"),
    "digest": (lambda m: m.update(agent_metadata=b"\x00agent"), "truncated or altered"),
    "agent": (lambda m: m.update(agent=""), "the agent ''"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_named(case: str) -> None:
    """Well-formed but wrong: 422, and the text says which row and which numbers."""
    edit, words = CONTRADICTIONS[case]
    manifest = plain_manifest()
    edit(manifest)
    with pytest.raises(ManifestError, match=words):
        decode(manifest)


def test_an_empty_manifest_is_refused() -> None:
    """A peer that offers nothing is a mistake, not a source."""
    manifest = plain_manifest()
    for table in ("tensors", "regions", "boxes"):
        manifest[table] = {column: [] for column in manifest[table]}
    with pytest.raises(ManifestError, match="offers no tensor"):
        decode(manifest)


def test_allowed_oddities_pass() -> None:
    """Overlap across devices, zero strides, a box that ends on its region's last byte."""
    manifest = plain_manifest()
    manifest["regions"] = {"addresses": [64, 64], "nbytes": [128, 2], "devices": [0, 1]}
    manifest["boxes"]["strides_bytes"][0] = [0, 4]
    decode(manifest)


def test_a_tensor_without_elements_needs_no_box() -> None:
    """Its name and shape are all there is to say."""
    manifest = plain_manifest()
    row = (("names", "c"), ("dtypes", "float32"), ("ndims", 2), ("shapes", [0, 7]))
    for column, value in row:
        manifest["tensors"][column].append(value)
    assert decode(manifest).tensor_shape(2) == (0, 7)


@pytest.mark.parametrize("header", [b"\xdd\x00\x98\x96\x80", b"\xdd\xff\xff\xff\xff"])
def test_a_column_that_only_claims_to_be_long_costs_nothing(header: bytes) -> None:
    """A short body with a header of 10 million (or 4 billion) rows is refused at once."""
    body = msgspec.msgpack.encode(wire(plain_manifest()))
    names = msgspec.msgpack.encode(["a.weight", "b.scale"])
    started = time.thread_time()
    with pytest.raises((AdminRequestError, ManifestError)):
        decode_manifest(body.replace(names, header + names[1:]), max_entries=LIMIT)
    assert time.thread_time() - started < 0.5


COLUMNS = [
    (table, column)
    for table, columns in plain_manifest().items()
    if table in ("tensors", "regions", "boxes")
    for column in columns
]


@pytest.mark.parametrize(("what", "counted"), COLUMNS)
def test_ten_million_entries_are_refused_before_they_are_built(what: str, counted: str) -> None:
    """Whatever the column, by its header: nothing of ten million is made of it, nor of a body."""
    manifest = wire(plain_manifest())
    body = msgspec.msgpack.encode(manifest)
    short = msgspec.msgpack.encode(manifest[what][counted])
    column = msgspec.msgpack.encode(counted) + short
    assert body.count(column) == 1
    words = counted in ("names", "dtypes")
    header = b"\xdd\x00\x98\x96\x80" if words else b"\xc6\x04\xc4\xb4\x00"
    content = b"\xa1a" * 10_000_000 if words else bytes(80_000_000)
    at = body.index(column) + len(column)
    long = b"".join((body[: at - len(short)], header, content, body[at:]))
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError, match=f"more {what} than the limit of 1000") as caught:
            decode_manifest(long, max_entries=LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert f"column {counted}" in caught.value.message


NESTED = 20_000_000
"""Arrays in an array: to pass over them alone takes most of a second."""


@pytest.mark.parametrize("field", ["agent", "surprise", "names", "model"])
def test_nested_arrays_are_refused_where_they_begin(field: str) -> None:
    """In place of a word, in a field that there is not, in a column, and for a fact."""
    nested = b"\xdd" + struct.pack(">I", NESTED) + b"\x90" * NESTED
    manifest = plain_manifest()
    if field == "names":
        manifest["tensors"]["names"] = ["MARK"]
    elif field == "model":
        manifest["model"] = {"fact": "MARK"}
    else:
        manifest = {field: "MARK"} | {key: each for key, each in manifest.items() if key != field}
    body = msgspec.msgpack.encode(wire(manifest)).replace(b"\xa4MARK", nested)
    started = time.thread_time()
    with pytest.raises(AdminRequestError) as caught:
        decode_manifest(body, max_entries=LIMIT)
    assert time.thread_time() - started < 0.1
    assert len(caught.value.message) < 500


def test_limits_hold_for_json_too() -> None:
    """JSON is bounded by bytes first, then by rows."""
    body = msgspec.json.encode(decode(plain_manifest()))
    with pytest.raises(ManifestError, match="3 boxes, more than the limit of 2"):
        decode_manifest(body, content_type=JSON, max_entries=2)
    with pytest.raises(ManifestError, match="more tensors than the limit of 1"):
        decode_manifest(body, content_type=JSON, max_entries=1)
    with pytest.raises(ManifestError, match="over the limit"):
        decode_manifest(body + b" " * MAX_JSON_BYTES, content_type=JSON, max_entries=LIMIT)


def test_the_box_of_a_tensor_has_the_tensors_axes() -> None:
    """Tables have as many axes as the widest tensor; the others' rows begin with fillers."""
    manifest = decode(plain_manifest())
    assert [manifest.tensor_shape(row) for row in range(2)] == [(4, 6), ()]
    boxes = [manifest.box(row) for row in range(manifest.box_count)]
    assert [(box.tensor, box.start, box.shape) for box in boxes] == [
        (0, (0, 0), (2, 6)),
        (0, (2, 0), (2, 6)),
        (1, (), ()),
    ]
    assert [(box.region, box.offset_bytes, box.strides_bytes) for box in boxes] == [
        (0, 0, (32, 4)),
        (0, 72, (32, 4)),
        (1, 0, ()),
    ]


def test_the_format_before_is_refused_by_its_number() -> None:
    """Numbers were lists in it; the text says which format a server wants."""
    body = msgspec.msgpack.encode(plain_manifest() | {"format": 1})
    with pytest.raises(AdminRequestError, match=r"no.* manifest of format 3: .*1.*format"):
        decode_manifest(body, max_entries=LIMIT)


def test_a_hundred_thousand_boxes_are_checked_as_columns() -> None:
    """The size of a large mixture of experts: one in the middle that is wrong is found."""
    rows = 100_000
    manifest = plain_manifest() | {
        "tensors": {
            "names": [f"model.layers.{n}.weight" for n in range(rows)],
            "dtypes": ["bfloat16"] * rows,
            "ndims": packed([2] * rows),
            "shapes": packed([64, 128] * rows),
        },
        "regions": {"addresses": [4096], "nbytes": [rows * 16384], "devices": [-1]},
        "boxes": {
            "tensors": packed(range(rows)),
            "starts": packed([0, 0] * rows),
            "shapes": packed([64, 128] * rows),
            "regions": packed([0] * rows),
            "offsets_bytes": packed(range(0, 16384 * rows, 16384)),
            "strides_bytes": packed([256, 2] * rows),
        },
    }
    assert decode(manifest, max_entries=rows).box_count == rows
    offsets = np.arange(0, 16384 * rows, 16384)
    offsets[77_777] = rows * 16384
    manifest["boxes"]["offsets_bytes"] = offsets.tobytes()
    with pytest.raises(ManifestError, match=r"box 77777 \(model.layers.77777.weight\)"):
        decode(manifest, max_entries=rows)


@given(st.binary(max_size=400))
@settings(max_examples=150, deadline=None)
def test_random_bytes_raise_only_our_errors(body: bytes) -> None:
    """Whatever arrives, the caller sees a 4xx."""
    for kind in (MSGPACK, JSON):
        with pytest.raises((AdminRequestError, ManifestError)):
            decode_manifest(body, content_type=kind, max_entries=LIMIT)


NUMBERS = st.one_of(st.integers(-3, 200), st.integers(-(2**63), 2**64 - 1))
COLUMNS = [
    (table, column)
    for table, columns in plain_manifest().items()
    if table in ("tensors", "regions", "boxes")
    for column in columns
]


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_mutated_manifests_raise_only_our_errors(data: st.DataObject) -> None:
    """Numbers replaced, rows added, bytes flipped: accepted or refused, never a crash."""
    manifest = plain_manifest()
    for _ in range(data.draw(st.integers(1, 3))):
        table, column = data.draw(st.sampled_from(COLUMNS))
        rows = manifest[table][column]
        text = column in ("names", "dtypes")
        values = st.text(max_size=4) if text else st.one_of(NUMBERS, st.lists(NUMBERS, max_size=9))
        value = data.draw(values)
        rows[data.draw(st.integers(0, len(rows) - 1))] = value
    body = bytearray(msgspec.msgpack.encode(wire(manifest)))
    for _ in range(data.draw(st.integers(0, 2))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with suppress(AdminRequestError, ManifestError):
        decode_manifest(bytes(body), max_entries=LIMIT)
