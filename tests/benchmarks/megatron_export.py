"""Megatron TP2 to whole HF tensors: our pull beside Megatron-Bridge's export, one live model.

Bridge: its public export, which gathers every tensor over gloo and yields whole HF tensors in the
trainer's own process. Ours: both ranks' shards are read over NIXL from where they lie into whole
HF tensors in another process. *First* is from the live model on: source maps, registration,
manifests, plan, connections, pull into fresh memory. *Each* is what later updates cost. Agents and
process groups are made before; Bridge gets its conversion tasks made before, too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from engine_plugins.weights.contract.manifest import decode_manifest
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.plan import build_plan, coalesced
from engine_plugins.weights.receiving.prepared_fetch import PreparedFetch
from tests.benchmarks import transformer_engine_stand_in
from tests.benchmarks.megatron_trainer import (
    TP_SIZE,
    MegatronTrainer,
    tensor_digests,
    transport_over,
)

QUIET = {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
BRIDGE = "Bridge's export"
MOST_ENTRIES = 100_000


class Receiver:
    """One process's share of our side: it holds whole HF tensors in an arena."""

    def __init__(self, trainer: MegatronTrainer, wires: str | None) -> None:
        self._trainer = trainer
        self._wires = wires
        self._transport = transport_over(wires, f"receiver-{secrets.token_hex(4)}")
        self._fetch: PreparedFetch | None = None
        # Agents are made once, as Bridge's process groups are.
        trainer.ask("offer", wires)

    def first(self) -> float:
        """From the live model to whole HF tensors, everything but the agents anew; seconds."""
        self.drop()
        began = time.perf_counter()
        offered = self._trainer.ask("offer", self._wires)
        manifests = [decode_manifest(each, max_entries=MOST_ENTRIES) for each in offered]
        tensors = logical_tensors(manifests)
        plan = build_plan(manifests, coalesced([([each.name], [each]) for each in tensors]))
        self._fetch = PreparedFetch(plan, manifests, self._transport, staged=True)
        self._pull(self._fetch)
        return time.perf_counter() - began

    def each(self) -> float:
        """One more update of the same plan; seconds."""
        began = time.perf_counter()
        self._trainer.ask("refresh")
        self._pull(self._prepared)
        return time.perf_counter() - began

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was pulled, as views of the arena."""
        steps = range(len(self._prepared.plan.steps))
        return dict(pair for index in steps for pair in self._prepared.tensors(index))

    def drop(self) -> None:
        """Give the arena and the plan's reads back."""
        if self._fetch is not None:
            self._fetch.close()
            self._fetch = None

    def close(self) -> None:
        """End the agent too."""
        self.drop()
        self._transport.close()

    @property
    def _prepared(self) -> PreparedFetch:
        assert self._fetch is not None
        return self._fetch

    @staticmethod
    def _pull(fetch: PreparedFetch) -> None:
        done = 0
        while done < len(fetch.plan.steps):
            steps = fetch.steps_with_room(done, installed=done)
            fetch.run_steps(
                steps,
                stall_timeout_s=60,
                deadline=time.monotonic() + 120,
                cancelled=lambda: False,
            )
            done = steps.stop


def megatron_export(folder: Path, *, pairs: int) -> Table:
    """The table; the model's tensors are compared bit for bit with both outputs first."""
    # Megatron and Bridge are imported once; the ranks are forked, before threads are started.
    import megatron.bridge  # noqa: F401

    with ExitStack() as stack:
        checkpoint = _checkpoint(folder)
        trainer = MegatronTrainer(multiprocessing.get_context("fork").Process, checkpoint)
        stack.callback(trainer.close)
        trainer.ask("ready")
        truth = load_file(checkpoint / "model.safetensors")
        expected = tensor_digests(truth)
        receivers = {}
        for wires in (None, "tcp"):
            receivers[wires or "CMA"] = Receiver(trainer, wires)
            stack.callback(receivers[wires or "CMA"].close)
        trainer.ask("export")
        _check(trainer.ask("digests")[0], expected)
        seconds: dict[str, list[float]] = {BRIDGE: []}
        for _ in range(pairs):
            seconds[BRIDGE].append(trainer.ask("export")[0])
            for wires, receiver in receivers.items():
                for kind, run in _runs(receiver).items():
                    seconds.setdefault(f"ours over {wires}, {kind}", []).append(run())
                _check(tensor_digests(receiver.tensors()), expected)
                receiver.drop()
        return _table(seconds, truth)


def _runs(receiver: Receiver) -> dict[str, Callable[[], float]]:
    return {"first": receiver.first, "each": receiver.each}


def _checkpoint(folder: Path) -> Path:
    """A dense Qwen3 of 125 million parameters, float32, in HF's form."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def _check(digests: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert digests == expected, [n for n in expected if digests.get(n) != expected[n]][:5]


def _table(seconds: dict[str, list[float]], truth: dict[str, torch.Tensor]) -> Table:
    nbytes = sum(tensor.nbytes for tensor in truth.values())
    title = f"Megatron TP{TP_SIZE} to {len(truth)} whole HF tensors, {nbytes / 1e6:.0f} MB"
    table = Table(title=f"{title}, {len(seconds[BRIDGE])} rounds")
    for column in ("who", "seconds", "spread", "times faster than Bridge", "spread "):
        table.add_column(column, justify="right")
    for who, taken in seconds.items():
        ratios = sorted(b / own for b, own in zip(seconds[BRIDGE], taken, strict=True))
        table.add_row(
            who,
            f"{statistics.median(taken):.3f}",
            f"{min(taken):.2f}-{max(taken):.2f}",
            f"{statistics.median(ratios):.1f}",
            f"{ratios[0]:.1f}-{ratios[-1]:.1f}",
        )
    return table


def main() -> None:
    """Print the table; runs in `.venv/megatron`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    pairs = parser.parse_args().pairs
    os.environ.update(QUIET)
    warnings.filterwarnings("ignore")
    transformer_engine_stand_in.install()
    with tempfile.TemporaryDirectory(prefix="engine-plugins-bench-") as folder:
        Console(width=100).print(megatron_export(Path(folder), pairs=pairs))


if __name__ == "__main__":
    main()
