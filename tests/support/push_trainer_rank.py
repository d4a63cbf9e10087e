r"""One process of a trainer that pushes: holds every second tensor of a model, and may break.

    python -m tests.support.push_trainer_rank RANK WORLD RENDEZVOUS URL TOKEN VERSION FOLDER STEP...

Steps: `push`; `break:RANK`: that rank's wire refuses the write; `die:RANK`: that rank ends
where it would write; `join:URL`: that engine takes this update too. Each step is an update to the
next version. Prints one JSON line for each.
"""

from __future__ import annotations

import json
import os
import sys

import torch.distributed as dist
from safetensors.torch import load_file

from engine_plugins.errors import EnginePluginError, TransportError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.transport.base import Descriptors, PreparedTransfer
from engine_plugins.weights.transport.nixl import NixlTransport


class BreakableTransport(NixlTransport):
    """NIXL, until it is told otherwise."""

    fault = ""

    def prepare_write(  # type: ignore[override]
        self, agent: str, descriptors: Descriptors, *, local_device: int, remote_device: int
    ) -> PreparedTransfer:
        write = super().prepare_write(
            agent, descriptors, local_device=local_device, remote_device=remote_device
        )
        return _BreakableWrite(self, write)


class _BreakableWrite:
    """A write that its transport's fault befalls when it is posted."""

    def __init__(self, transport: BreakableTransport, write: PreparedTransfer) -> None:
        self._transport, self._write = transport, write
        self.peer, self.nbytes, self.direction = write.peer, write.nbytes, write.direction
        self.done, self.release = write.done, write.release

    def post(self) -> None:
        if self._transport.fault == "die":
            os._exit(3)
        if self._transport.fault == "break":
            raise TransportError(f"{self.peer}: told to refuse this write")
        self._write.post()


def main() -> None:
    """Join the others and take every step; say how each ended."""
    global_rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    rendezvous, url, token, version, folder, *steps = sys.argv[3:]
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=global_rank, world_size=world_size
    )
    whole = load_file(f"{folder}/model.safetensors")
    mine = {name: whole[name] for name in sorted(whole)[global_rank::world_size]}
    transport = BreakableTransport(f"push-trainer-{os.getpid()}")
    with WeightSender.from_hf(
        mine, engines=url, token=token, transport=transport, direction="push"
    ) as sender:
        for number, step in enumerate(steps, int(version)):
            fault, _, who = step.partition(":")
            transport.fault = fault if who == str(global_rank) else ""
            said: dict[str, object] = {"step": step}
            if fault == "join":
                sender.add_engines(who)
            try:
                said["version"] = sender.update(number).version
            except EnginePluginError as error:
                said["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(said), flush=True)
    transport.close()


if __name__ == "__main__":
    main()
