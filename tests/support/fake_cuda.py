"""A fake CUDA runtime, compiled by the tests: what torch's own would be on a GPU machine."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

__all__ = ["build_cudart", "build_user"]

_SOURCE = Path(__file__).with_name("fake_cudart.c")


def build_cudart(folder: Path, *, stub: bool = False) -> Path:
    """A libcudart; as a stub it lacks most functions, like those that packages ship.

    Its name is its own: of one name the loader loads one library in a process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"libcudart-{uuid.uuid4().hex[:8]}.so.13"
    _compile(folder / name, str(_SOURCE), f"-Wl,-soname,{name}", *(["-DSTUB"] if stub else []))
    return folder / name


def build_user(folder: Path, cudart: Path) -> Path:
    """A library linked against a libcudart that lies elsewhere, as torch's libc10_cuda is."""
    library = folder / "libc10_cuda.so"
    source = folder / "user.c"
    source.write_text("int cudaMalloc(void **, unsigned long);\nvoid *user = (void *)cudaMalloc;\n")
    _compile(library, str(source), str(cudart), f"-Wl,-rpath,{cudart.parent}")
    return library


def _compile(library: Path, *arguments: str) -> None:
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), *arguments], check=True)
