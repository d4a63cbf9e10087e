"""Which machine a process is on, as its manifests and its engine's rank say it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from engine_plugins.weights.hardware.machine import BOOT_ID, machine_id
from tests.support.source_ranks import offered_boxes, whole


def test_pods_of_one_node_are_near_whatever_their_hostnames(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two pods on this node, with names of their own, both say the same; so do manifests."""
    said = set()
    for name in ("trainer-0", "engine-7f9c"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        said.add(machine_id())
        with offered_boxes([whole("w", torch.zeros(2))]) as (rank,):
            said.add(rank.manifest.host)
    assert said == {BOOT_ID.read_text().strip()}


def test_where_no_boot_id_is_shown_the_hostname_must_do(tmp_path: Path) -> None:
    shown = tmp_path / "boot_id"
    assert machine_id(shown) == socket.gethostname()
    shown.write_text("\n")
    assert machine_id(shown) == socket.gethostname()
    shown.write_text("3f2a\n")
    assert machine_id(shown) == "3f2a"
