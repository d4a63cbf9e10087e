"""Limits of cgroups: written files of both hierarchies, and one that the kernel enforces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_plugins.cgroup_limit import tightest_cgroup
from tests.support.memory_cgroup import memory_cgroup

OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
UNIFIED = ("memory.max", "memory.current", "inactive_file")
IN_A_CGROUP = """
import sys
from engine_plugins.prefill_gate.memory_cap import HostFigures, resolve_cap
print("here", flush=True)
sys.stdin.readline()
cap = resolve_cap(None, HostFigures.now())
print(cap.reason, cap.resident_bytes, HostFigures.now().cgroup_limit, flush=True)
"""


@pytest.mark.parametrize(
    ("line", "below", "files"),
    [
        ("0::/outer/inner", "", UNIFIED),
        ("0::/outer/inner", "unified", UNIFIED),
        ("4:cpu,memory:/outer/inner", "memory", OLD),
    ],
)
def test_the_tightest_cgroup_above_the_process_counts(
    line: str, below: str, files: tuple[str, str, str], tmp_path: Path
) -> None:
    """Without the page cache, which makes room for whoever wants it."""
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_text(f"1:pids:/x\n{line}\n")
    inner = root / below / "outer" / "inner"
    inner.mkdir(parents=True)
    unlimited = "max" if files == UNIFIED else "9223372036854771712"
    _group(inner, files, limit=unlimited, used=300)
    assert tightest_cgroup(root, own) == (None, 0)
    _group(inner.parent, files, limit="1000", used=900, cache=400)
    assert tightest_cgroup(root, own) == (1000, 500)
    _group(inner, files, limit="600", used=300)
    assert tightest_cgroup(root, own) == (600, 300)
    assert tightest_cgroup(root, tmp_path / "none") == (None, 0)


def test_a_container_that_sees_its_own_cgroup_as_the_top_finds_the_limit(tmp_path: Path) -> None:
    """The path that the process is told is then of a tree that is not mounted."""
    own = tmp_path / "own"
    own.write_text("0::/host/path/that/is/not/here\n")
    _group(tmp_path, UNIFIED, limit="700", used=200)
    assert tightest_cgroup(tmp_path, own) == (700, 200)


def test_a_limit_that_the_kernel_enforces_is_the_cap() -> None:
    """A process in a cgroup of 400 MiB may come to hold no more."""
    with memory_cgroup(f"engine-plugins-{os.getpid()}") as group:
        if group is None:
            pytest.skip("no cgroup can be made here: it takes a writable memory controller")
        process = subprocess.Popen(
            [sys.executable, "-c", IN_A_CGROUP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        group.limit(400 << 20)
        group.add(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        said = process.stdout.readline()
        process.communicate()
    reason, cap, limit = said.rsplit(" ", 2)
    assert "cgroup" in reason
    assert int(limit) == 400 << 20
    # What is charged to it is what it touches there, not what it brought along.
    assert 390 << 20 < int(cap) < 600 << 20


def _group(
    folder: Path, files: tuple[str, str, str], *, limit: str, used: int, cache: int = 0
) -> None:
    limit_file, used_file, inactive = files
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / used_file).write_text(f"{used}\n")
    active = inactive.replace("inactive", "active")
    (folder / "memory.stat").write_text(f"anon 1\n{inactive} {cache}\n{active} 0\n")
