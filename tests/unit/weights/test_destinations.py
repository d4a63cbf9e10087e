"""What a trainer writes, as columns of bytes that any language can read."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from engine_plugins.errors import PlanError
from engine_plugins.weights.contract.destinations import Destination, Writes

ROWS = np.array([[1, 10, 4], [2, 20, 8], [2**63, 30, 16]], dtype=np.uint64)


def writes(local: list[int], remote: list[int]) -> Writes:
    return Writes.of(ROWS, np.array(local, dtype=np.int32), np.array(remote, dtype=np.int32))


def test_rows_come_back_by_pairs_of_devices() -> None:
    """A transport prepares one pair at a time; every row is in one of them."""
    back = {(a, b): rows.tolist() for a, b, rows in writes([0, -1, 0], [-1, -1, 2]).by_devices()}
    assert back == {
        (-1, -1): [ROWS[1].tolist()],
        (0, -1): [ROWS[0].tolist()],
        (0, 2): [ROWS[2].tolist()],
    }
    assert writes([0, 0, 0], [0, 0, 0]).total_bytes == 28


def test_a_destination_travels_as_json() -> None:
    """Bytes are base64 there, and the same bytes afterwards."""
    told = Destination(
        tp_rank=1,
        agent="engine-1",
        agent_metadata=b"\x00\xff",
        agent_metadata_sha256="0" * 64,
        writes={"trainer-0": writes([-1] * 3, [-1] * 3)},
    )
    body = msgspec.json.encode(told)
    assert b'"AP8="' in body
    assert msgspec.json.decode(body, type=Destination) == told


@pytest.mark.parametrize("column", ["local", "remote", "nbytes", "local_devices", "remote_devices"])
@pytest.mark.parametrize("cut", [1, 8])
def test_columns_of_other_lengths_are_refused(column: str, cut: int) -> None:
    """A row that is cut, or one too few: nothing is written from it."""
    whole = writes([-1] * 3, [-1] * 3)
    short = msgspec.structs.replace(whole, **{column: getattr(whole, column)[:-cut]})
    with pytest.raises(PlanError, match="not of one length"):
        list(short.by_devices())
