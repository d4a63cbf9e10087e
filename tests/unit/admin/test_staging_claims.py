"""Claims of servers that stage at once: each sees the others, and none outlives its server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_plugins.admin.staging_claims import StagingClaims

CLAIMANT = """
import sys
from pathlib import Path
from engine_plugins.admin.staging_claims import StagingClaims
with StagingClaims(Path(sys.argv[1])).claimed(700) as others:
    print(others, flush=True)
    sys.stdin.readline()
"""


def test_claims_are_seen_while_they_are_held(tmp_path: Path) -> None:
    """In any order; a server's own claim is not another's."""
    here, there = StagingClaims(tmp_path / "claims"), StagingClaims(tmp_path / "claims")
    with here.claimed(5) as nobody, there.claimed(7) as others:
        assert (nobody, others) == (0, 5)
        with here.claimed(1) as both:
            assert both == 12
    with there.claimed(1) as left:
        assert left == 0
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_claim_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    """However it ended: the kernel unlocks its file, and whoever reads it next removes it."""
    claims = StagingClaims(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", CLAIMANT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"0\n"
        with claims.claimed(1) as others:
            assert others == 700
        server.kill()
    assert len(list(tmp_path.iterdir())) == 1
    with claims.claimed(1) as others:
        assert others == 0
    assert list(tmp_path.iterdir()) == []


def test_a_failure_takes_the_claim_back(tmp_path: Path) -> None:
    claims = StagingClaims(tmp_path)
    with pytest.raises(RuntimeError, match="update"), claims.claimed(5):
        raise RuntimeError("the update failed")
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_had_nothing_is_claimed(tmp_path: Path) -> None:
    """No update fails for it."""
    (tmp_path / "claims").write_text("not a folder")
    with StagingClaims(tmp_path / "claims").claimed(5) as others:
        assert others == 0
