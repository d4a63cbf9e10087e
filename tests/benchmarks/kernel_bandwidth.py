"""How much of the GPU's own copy and read bandwidth the kernels reach; needs a GPU.

`python -m tests.benchmarks.kernel_bandwidth` prints the device and a table, and ends with 1 where
FP8 quantization is below 85 % of the copy or the digest below 85 % of the read of the same run.
Bytes count as they must move: read once, written once. Beside each kernel its reference, eager and
under torch.compile. Medians of interleaved runs, by events on the stream, with L2 overwritten
before each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from engine_kernels import BlockFormat, ScaleLayout, add_digest, quantize_blocks
from engine_kernels.block_quantize import reference as quantize_reference
from engine_kernels.digest import reference as digest_reference

__all__ = ["kernel_bandwidth"]

SHAPE = (16, 4096, 7168)
"""Experts as DeepSeek-V3's are, a GiB of bf16 nearly."""
BOUND = 0.85
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Work:
    """Something that moves so many bytes, and what its speed is held against."""

    name: str
    run: Callable[[], object]
    moved_bytes: int
    against: str | None = None
    is_bound: bool = False


def kernel_bandwidth(*, runs: int) -> tuple[Table, list[str]]:
    """The table, and what is too slow."""
    works = _works()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {work.name: [] for work in works}
    for work in works:
        work.run()
        work.run()
    for _ in range(runs):
        for work in works:
            flush.zero_()
            seconds[work.name].append(_seconds(work.run))
    speed = {work.name: work.moved_bytes / statistics.median(seconds[work.name]) for work in works}
    table = Table("what", "GB/s", "of copy or read", title=torch.cuda.get_device_name())
    slow = []
    for work in works:
        share = speed[work.name] / speed[work.against] if work.against else 1.0
        table.add_row(work.name, f"{speed[work.name] / 1e9:.0f}", f"{share:.2f}")
        if work.is_bound and share < BOUND:
            slow.append(f"{work.name}: {share:.2f} of {work.against}, wanted {BOUND}")
    return table, slow


def _seconds(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _works() -> list[Work]:
    weights = torch.randn(SHAPE, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(weights)
    plain = [
        Work(name="copy", run=lambda: target.copy_(weights), moved_bytes=2 * weights.nbytes),
        Work(
            name="read",
            run=lambda: weights.view(torch.float32).amax(),
            moved_bytes=weights.nbytes,
        ),
    ]
    packed = BlockFormat(powers_of_two=True, layout=ScaleLayout.PACKED_UE8M0)
    formats = {"float32 scales": BlockFormat(), "packed UE8M0": packed}
    quantize = [
        work
        for name, block_format in formats.items()
        for work in _quantize(name, block_format, weights)
    ]
    return [*plain, *quantize, *_digest(weights)]


def _quantize(name: str, block_format: BlockFormat, weights: torch.Tensor) -> list[Work]:
    values = torch.empty(SHAPE, dtype=torch.float8_e4m3fn, device="cuda")
    scales = block_format.new_scales(SHAPE, "cuda")
    moved_bytes = weights.nbytes + values.nbytes + scales.numel() * scales.element_size()

    def eager() -> None:
        quantize_reference.quantize_blocks(weights, values, scales, block_format)

    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: quantize_blocks(weights, values, scales, block_format),
        "torch": eager,
        "torch.compile": torch.compile(eager),
    }
    return [
        Work(
            name=f"quantize, {name}: {who}",
            run=run,
            moved_bytes=moved_bytes,
            against="copy",
            is_bound=who == "ours",
        )
        for who, run in runs.items()
    ]


def _digest(weights: torch.Tensor) -> list[Work]:
    into = torch.zeros(1, dtype=torch.int64, device="cuda")
    words = weights.view(torch.int16)

    def eager() -> None:
        digest_reference.add_digest(words, into, SHAPE, (0, 0, 0))

    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: add_digest(weights, into),
        "torch": eager,
        "torch.compile": torch.compile(eager),
    }
    return [
        Work(
            name=f"digest: {who}",
            run=run,
            moved_bytes=weights.nbytes,
            against="read",
            is_bound=who == "ours",
        )
        for who, run in runs.items()
    ]


def main() -> int:
    """Print the table; 1 where a bound is missed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=21)
    chosen = parser.parse_args()
    console = Console(width=100)
    if not torch.cuda.is_available():
        console.print("kernel_bandwidth: skipped, this process has no CUDA device")
        return 2
    table, slow = kernel_bandwidth(runs=chosen.runs)
    console.print(table)
    for line in slow:
        console.print(f"too slow: {line}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
