"""Real tensors under the gate: layers and logits of a small model, measured by the kernel.

Run as a program, in a process of its own with the allocator that engines are given on the CPU:
otherwise freed memory is used again and no peak shows.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import psutil
import torch

from engine_plugins.prefill_gate.gate import PrefillGate
from engine_plugins.prefill_gate.memory_cap import HostFigures, read_host, resolve_cap
from engine_plugins.prefill_gate.model_memory import ModelMemory, ModelSizes
from engine_plugins.prefill_gate.prefill_memory import PrefillMemory
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from engine_plugins.settings import Settings
from engine_plugins.weights.hardware.peak_memory import PeakMemory

MIB = 1 << 20
PINNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
SIZES = ModelSizes(hidden=512, intermediate=2048, heads=8, kv_heads=8, head_dim=64, vocab=8192)
MEASURED = (64, 128, 256, 512)
NOT_MEASURED = (100, 300, 1000)


class Layers:
    """One layer's MLP and the head, in float32."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self._up = torch.randn(SIZES.hidden, 2 * SIZES.intermediate) / 30
        self._down = torch.randn(SIZES.intermediate, SIZES.hidden) / 30
        self._head = torch.randn(SIZES.hidden, SIZES.vocab) / 30

    @torch.inference_mode()
    def step(self, tokens: int, *, logprobs: bool) -> float:
        """A step over one prompt; gives something that depends on all of it."""
        hidden = torch.ones(tokens, SIZES.hidden)
        gate, up = (hidden @ self._up).chunk(2, dim=-1)
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ self._down
        del gate, up
        if logprobs:
            scores = (hidden @ self._head).log_softmax(-1, dtype=torch.float32)
            return float(scores[:, 0].sum())
        return float((hidden[-1:] @ self._head).max())

    def measured(self, tokens: int, *, logprobs: bool) -> int:
        """Bytes of the step's peak over what was in use before it."""
        measuring = PeakMemory.start(already_held=0)
        self.step(tokens, logprobs=logprobs)
        return measuring.peak_extra_bytes()


def shape_of(tokens: int, *, logprobs: bool) -> StepShape:
    """The same step, as the predictor is told of it."""
    return _candidate(tokens, logprobs=logprobs).joined_to(NOTHING, tokens)


def _candidate(tokens: int, *, logprobs: bool) -> Candidate:
    return Candidate("x", tokens, tokens, prompt_logprobs=logprobs, divisible=False)


def main() -> None:
    """Print what was predicted and measured, and what the gate does where little is left."""
    layers = Layers()
    memory = PrefillMemory(
        ModelMemory(SIZES, itemsize=4), margin_quantile=0.99, margin_bytes=4 * MIB
    )
    for tokens in MEASURED:
        for logprobs in (False, True):
            for _ in range(3):
                peak = layers.measured(tokens, logprobs=logprobs)
                memory.observe(shape_of(tokens, logprobs=logprobs), peak, at=time.time())
    steps = []
    for logprobs in (False, True):
        kind = "prompt_logprobs" if logprobs else "layers"
        for tokens in NOT_MEASURED:
            layers.measured(tokens, logprobs=logprobs)
            measured = layers.measured(tokens, logprobs=logprobs)
            predicted = memory.predict(shape_of(tokens, logprobs=logprobs)).peak_bytes
            steps.append((kind, tokens, measured, predicted))
    report = {"steps": steps, **_limited(layers, memory)}
    sys.stdout.write(json.dumps(report))


def _limited(layers: Layers, memory: PrefillMemory) -> dict[str, object]:
    """With 60 MiB of addresses left: without the gate, and with it."""
    addresses = psutil.Process().memory_info().vms
    limit = addresses + 60 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    cap = resolve_cap(None, HostFigures.now())
    gate = PrefillGate(memory, Settings(prefill_gate="enforce"), smallest_chunk=16)
    gate.configure(Settings(prefill_gate="enforce", prefill_margin_bytes=4 * MIB))
    gate.begin(read_host(cap).reading(None), in_flight=False, now=0.0)
    first = gate.decide(_candidate(2000, logprobs=True))
    gate.reclaimed()
    gate.begin(read_host(cap).reading(None), in_flight=False, now=0.0)
    second = gate.decide(_candidate(2000, logprobs=True))
    largest = second.largest_prompt
    outcomes = [first.outcome, second.outcome]
    layers.step(largest, logprobs=True)
    try:
        layers.step(2000, logprobs=True)
    except RuntimeError as error:
        return {"outcomes": outcomes, "largest": largest, "ungated": str(error)}
    return {"outcomes": outcomes, "largest": largest, "ungated": ""}


if __name__ == "__main__":
    main()
