"""Files that processes keep for each other: whole or not at all, on whatever is left of a disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine_plugins.admin.runtime_files import RuntimeFiles
from engine_plugins.errors import EnginePluginError, ServerFilesError
from engine_plugins.scarce import explained
from tests.support.limits import NO_DESCRIPTORS, limited
from tests.support.state_processes import started


@pytest.fixture
def files(runtime_dir: Path) -> RuntimeFiles:
    return RuntimeFiles(runtime_dir, "sources")


def names(files: RuntimeFiles) -> list[str]:
    return [each.name for each in files.listed()]


def test_files_are_seen_whole_and_longest_unused_first(runtime_dir: Path) -> None:
    """By every process; forgotten ones are gone, twice is harmless."""
    ours, theirs = RuntimeFiles(runtime_dir, "plans"), RuntimeFiles(runtime_dir, "plans")
    assert names(ours) == []
    for name in ("b", "a", "c"):
        ours.put(name, name.encode() * 3)
        time.sleep(0.01)
    assert names(theirs) == ["b", "a", "c"]
    assert theirs.get("a") == b"aaa"
    ours.put("b", b"newer")
    assert [(each.name, each.size) for each in theirs.listed()] == [("a", 3), ("c", 3), ("b", 5)]
    assert theirs.get("b") == b"newer"
    time.sleep(0.01)
    assert theirs.touch("a")
    assert not theirs.touch("d")
    assert names(ours) == ["c", "b", "a"]
    theirs.drop(["a"])
    theirs.drop(["a"])
    assert ours.get("a") is None
    (ours.folder / "half.1.tmp").write_bytes(b"ha")
    assert names(ours) == ["c", "b"]


def test_listing_survives_files_that_others_drop_meanwhile(files: RuntimeFiles) -> None:
    """One process prunes while another looks."""
    body = """
        from engine_plugins.admin.runtime_files import RuntimeFiles
        files = RuntimeFiles(shared.runtime_dir, "sources")
        print("ready", flush=True)
        while True:
            for n in range(50):
                files.put(f"a{n}", b"x")
            files.drop(f"a{n}" for n in range(50))
    """
    with started(body, files.folder.parent):
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            files.listed()


def test_a_folder_that_was_removed_is_made_again(files: RuntimeFiles) -> None:
    """With all above it, for this user alone."""
    files.put("a", b"x")
    shutil.rmtree(files.folder.parent)
    assert files.get("a") is None
    assert files.listed() == []
    assert files.free_bytes() > 0
    files.drop(["a"])
    files.put("a", b"y")
    assert files.get("a") == b"y"
    for folder in (files.folder, files.folder.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_somebody_put_there_is_not_written_to(
    files: RuntimeFiles, tmp_path: Path
) -> None:
    """Whoever removed ours may want to read what we write."""
    shutil.rmtree(files.folder.parent)
    (tmp_path / "theirs").mkdir()
    files.folder.parent.symlink_to(tmp_path / "theirs")
    with pytest.raises(ServerFilesError, match="another user's"):
        files.put("a", b"x")
    assert list((tmp_path / "theirs").iterdir()) == []


def test_a_file_that_finds_no_room_leaves_nothing(files: RuntimeFiles) -> None:
    """Not half of it either. (A limit of file sizes stands for a full disk here.)"""
    files.put("a", b"x" * 100)
    with limited(resource.RLIMIT_FSIZE, 1000):
        with pytest.raises(ServerFilesError, match="File too large") as raised:
            files.put("a", b"y" * 2000)
        assert "ulimit -f" in raised.value.remedy
    assert files.get("a") == b"x" * 100
    assert [path.name for path in files.folder.iterdir()] == ["a"]


def test_used_up_descriptors_are_named_with_what_to_do(files: RuntimeFiles) -> None:
    """Reading, writing and listing."""
    files.put("a", b"x")
    with limited(resource.RLIMIT_NOFILE, NO_DESCRIPTORS):
        for attempt in (lambda: files.put("a", b"y"), lambda: files.get("a"), files.listed):
            with pytest.raises(ServerFilesError, match="Too many open files") as raised:
                attempt()
            assert str(files.folder) in raised.value.message
            assert "ulimit -n" in raised.value.remedy
    assert files.get("a") == b"x"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space on the disk of /run/x"),
        (errno.EDQUOT, "quota of /run/x"),
        (errno.EROFS, "mount the disk of /run/x"),
        (errno.ENFILE, "fs.file-max"),
        (errno.EACCES, "/run/x was removed"),
    ],
)
def test_an_error_of_the_machine_says_what_to_do(number: int, remedy: str) -> None:
    """And names the directory."""
    told = explained(OSError(number, os.strerror(number)), Path("/run/x"))
    assert isinstance(told, ServerFilesError)
    assert os.strerror(number) in told.message
    assert remedy in told.remedy


def test_another_error_stays_what_it_is() -> None:
    """Only what the machine has run out of is told so where no folder is known."""
    assert type(explained(ValueError("odd"))) is EnginePluginError
    assert explained(ValueError("odd")).message == "ValueError: odd"
    assert type(explained(FileNotFoundError(errno.ENOENT, "gone"))) is EnginePluginError
    assert type(explained(OSError(errno.EMFILE, "many"))) is ServerFilesError


def test_threads_that_bring_the_same_file_at_once_do_not_disturb_each_other(
    files: RuntimeFiles,
) -> None:
    """As of a manifest that is published twice."""
    body = b"x" * 100_000
    with ThreadPoolExecutor(8) as pool:
        for told in [pool.submit(files.put, "a", body) for _ in range(400)]:
            told.result()
    assert files.get("a") == body
    assert [path.name for path in files.folder.iterdir()] == ["a"]
