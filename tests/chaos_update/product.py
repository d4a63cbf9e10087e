"""Which checkout's product is tried: this one's, or another's under the same tests."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.support.engine_server import ROOT

__all__ = ["python_path", "run_with"]

PACKAGES = ("engine_plugins", "vllm_ext", "sglang_ext")
_LINKS = "CHAOS_UPDATE_PRODUCT"


def run_with(product: Path) -> None:
    """Begin this program anew with another checkout's packages in front; returns in that one.

    A checkout's own tests must stay out of it, so that its packages are linked in a folder. Python
    is told to leave the current folder out of its path, which has this checkout's packages.
    """
    if _LINKS in os.environ:
        return
    links = Path(tempfile.mkdtemp(prefix="chaos-update-product-"))
    for package in PACKAGES:
        (links / package).symlink_to(product.resolve() / package)
    (links / "engine_kernels").symlink_to(product.resolve() / "kernels" / "engine_kernels")
    os.environ |= {_LINKS: str(links), "PYTHONSAFEPATH": "1"}
    os.environ["PYTHONPATH"] = python_path()
    os.execv(sys.executable, [sys.executable, "-m", "tests.chaos_update", *sys.argv[1:]])


def python_path(*first: Path) -> str:
    """Where the processes of servers and trainers find the product, and the tests' own modules."""
    product = [Path(os.environ[_LINKS])] if _LINKS in os.environ else []
    return os.pathsep.join(map(str, [*first, *product, ROOT, ROOT / "kernels"]))
