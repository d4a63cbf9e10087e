"""A page is read whole or as it was before, whoever writes it and however a writer ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine_plugins.errors import EnginePluginError
from engine_plugins.shared_page import SharedPage
from tests.support.engine_server import ROOT

NBYTES = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty page."""
    SharedPage.create(tmp_path / "page", nbytes=NBYTES)
    return tmp_path / "page"


def test_an_empty_page_has_sequence_0(path: Path) -> None:
    """And no bytes."""
    assert SharedPage(path).sequence == 0
    assert SharedPage(path).read() == (0, b"")


def test_every_view_sees_the_newest_bytes(path: Path) -> None:
    """Shorter and longer ones, and none at all."""
    writer, reader = SharedPage(path), SharedPage(path)
    for sequence, body in enumerate((b"first", b"", b"x" * 1500, b"last"), 1):
        writer.write(body)
        assert reader.sequence == sequence
        assert reader.read() == SharedPage(path).read() == (sequence, body)


def test_making_a_page_that_is_there_leaves_it(path: Path) -> None:
    """The second process of two that make it."""
    SharedPage(path).write(b"kept")
    SharedPage.create(path, nbytes=NBYTES)
    assert SharedPage(path).read() == (1, b"kept")


OPENER = """
import sys
from pathlib import Path
from engine_plugins.shared_page import SharedPage
print("ready", flush=True)
for number in range(500):
    path = Path(sys.argv[1]) / f"page{number}"
    while not path.exists():
        pass
    assert SharedPage(path).read() == (0, b"")
"""


def test_a_page_that_is_seen_can_be_read(tmp_path: Path) -> None:
    """By a process that waits for it while another makes it."""
    opener = subprocess.Popen(
        [sys.executable, "-c", OPENER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    with opener:
        assert opener.stdout is not None
        assert opener.stdout.readline() == b"ready\n"
        for number in range(500):
            SharedPage.create(tmp_path / f"page{number}", nbytes=NBYTES)
            time.sleep(0)
        assert opener.wait(60) == 0
    assert len(list(tmp_path.iterdir())) == 500, "nothing but the pages is left"


def test_bytes_that_do_not_fit_are_refused(path: Path) -> None:
    """The page is named and stays as it was."""
    page = SharedPage(path)
    page.write(b"before")
    with pytest.raises(EnginePluginError, match=str(path)):
        page.write(b"x" * NBYTES)
    assert page.read() == (1, b"before")


def test_a_writer_that_dies_half_way_spoils_nothing(path: Path) -> None:
    """What it has begun lies in the slot that nobody reads, and the next write replaces it."""
    page = SharedPage(path)
    page.write(b"first")
    page.write(b"second")
    whole = bytearray(path.read_bytes())
    begun = whole.index(b"first")
    with path.open("r+b") as file:
        file.seek(begun)
        file.write(b"third, ha")
    assert page.read() == (2, b"second")
    page.write(b"third")
    assert page.read() == (3, b"third")


def test_a_page_that_was_overwritten_is_said_to_be_spoiled(path: Path) -> None:
    """Not half of it given out."""
    page = SharedPage(path)
    page.write(b"whole")
    begun = path.read_bytes().index(b"whole")
    with path.open("r+b") as file:
        file.seek(begun)
        file.write(b"W")
    with pytest.raises(EnginePluginError, match="cannot be read"):
        page.read()


WRITER = """
import sys
from pathlib import Path
from engine_plugins.shared_page import SharedPage
page = SharedPage(Path(sys.argv[1]))
for number in range(1, 20_001):
    page.write(bytes([number % 251]) * (number % 1900))
"""


def test_a_reader_never_sees_parts_of_two_writes(path: Path) -> None:
    """While another process writes as fast as it can."""
    page, seen = SharedPage(path), 0
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT) as writer:
        while writer.poll() is None:
            sequence, body = page.read()
            assert body == bytes([sequence % 251]) * (sequence % 1900)
            assert sequence >= seen
            seen = sequence
        assert writer.returncode == 0
    assert page.read()[0] == 20_000
