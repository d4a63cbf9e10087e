"""An engine rank in a process of its own, that reads over NIXL and may be stopped in the middle.

It hears a manifest, then lines of json: how to start. It says how far it is, and how it ended.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time

import torch

from engine_plugins.weights.contract.manifest import SourceManifest, decode_manifest
from engine_plugins.weights.receiving.receiver import WeightReceiver
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.in_memory_model import InMemoryInstaller, InMemoryModel, hf_tensors

__all__ = ["filled"]

LAYERS, HIDDEN = 12, 1024
"""Some 150 MB in float32: a read of it can be stopped in the middle."""


def main() -> None:
    """Serve zeros until told otherwise."""
    model = InMemoryModel.loaded(filled(0.0))
    receiver = WeightReceiver(
        InMemoryInstaller(model),
        lambda: NixlTransport(f"reader-{os.getpid()}"),
        tp_rank=0,
        stall_timeout_s=30.0,
        direct_landing=False,
    )
    say(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        manifest = decode_manifest(base64.b64decode(asked["manifest"]), max_entries=10_000)
        receiver.connect("plan", [manifest])
        say(connected=True)
        pull(receiver, manifest, word=asked["word"], timeout_s=asked["timeout_s"])
        layers = [each for name, each in model.named_parameters() if name.startswith("layers.")]
        say(values=sorted({value for each in layers for value in ends(each)}))


def pull(
    receiver: WeightReceiver, manifest: SourceManifest, *, word: int | None, timeout_s: float
) -> None:
    """A staged update, installed if every byte is one version's."""
    status = receiver.start("plan", staged=True, timeout_s=timeout_s, word=word)
    told = 0
    while status.steps_ready < status.steps_total and status.error is None:
        if status.bytes_done and not told:
            told = status.bytes_done
            say(bytes_done=told, bytes_total=status.bytes_total)
        time.sleep(0.001)
        status = receiver.poll()
    if status.error is not None:
        aborted = receiver.abort()
        say(error=type(status.error).__name__, wrote=aborted.wrote, lost=aborted.lost)
        return
    while receiver.advance(budget_s=1).steps_installed < status.steps_total:
        pass
    receiver.finish()
    say(error=None, wrote=True, lost=False)


def ends(tensor: torch.Tensor) -> list[float]:
    """Its smallest and largest value."""
    return [tensor.min().item(), tensor.max().item()]


def say(**words: object) -> None:
    """One line, which nothing of UCX's is mistaken for."""
    print("SAYS " + json.dumps(words), flush=True)


def filled(value: float) -> dict[str, torch.Tensor]:
    """A checkpoint of one value, of some 150 MB."""
    small = hf_tensors(seed=0, layers=LAYERS, hidden=16)
    size = {16: HIDDEN, 8: HIDDEN // 2}
    return {
        name: torch.full([size.get(extent, extent) for extent in each.shape], value)
        for name, each in small.items()
    }


if __name__ == "__main__":
    main()
