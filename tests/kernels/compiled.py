"""Kernels compiled for GPUs that are not here, with the arguments of the launches that ship."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton.backends.nvidia
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

__all__ = ["Launch", "Usage", "captured", "compiled"]

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.uint16: "*u16",
    torch.int32: "*i32",
    torch.uint32: "*u32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What one launch hands to triton."""

    kernel: JITFunction[Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one thread of a compiled kernel takes, and the text of its PTX."""

    registers: int
    stack_bytes: int
    ptx: str


@contextmanager
def captured(module: ModuleType, name: str) -> Iterator[list[Launch]]:
    """Launches of a module's kernel are noted and not run."""
    kernel, launches = getattr(module, name), list[Launch]()

    class Notes:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **keywords: launches.append(
                Launch(kernel=kernel, arguments=arguments, keywords=keywords)
            )

    setattr(module, name, Notes())
    try:
        yield launches
    finally:
        setattr(module, name, kernel)


def compiled(launch: Launch, compute_capability: int) -> Usage:
    """A launch compiled as triton would at its first call, by its own ptxas."""
    assert isinstance(launch.kernel, JITFunction), "TRITON_INTERPRET is set in this process"
    names = launch.kernel.arg_names
    options = {name: value for name, value in launch.keywords.items() if name in OPTIONS}
    constants = {name: value for name, value in launch.keywords.items() if name not in OPTIONS}
    signature, attributes = {}, {}
    for index, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, int) and value == 1:
            constants[name] = 1
            continue
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if address % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "i32" if value < 1 << 31 else "i64"
    source = ASTSource(
        fn=launch.kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    target = GPUTarget("cuda", compute_capability, 32)
    result = compile_kernel(source, target=target, options=options)
    return Usage(**_usage(result.asm["cubin"]), ptx=result.asm["ptx"])


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", said)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"]}
