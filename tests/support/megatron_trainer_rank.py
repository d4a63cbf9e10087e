r"""One process of a Megatron trainer: holds its rank's shards and updates a live engine.

    python -m tests.support.megatron_trainer_rank \
        RANK WORLD RENDEZVOUS URL TOKEN CASE VERSION [DIRECTION]

Prints the report's version and bytes as JSON; every rank must print the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from engine_plugins import WeightSender
from engine_plugins.admin_answers import Direction
from tests.support.megatron_fixtures import MegatronCase


def main() -> None:
    """Join the others, update once, say what came of it."""
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    rendezvous, url, token, folder, version = sys.argv[3:8]
    direction: Direction = "push" if sys.argv[8:] == ["push"] else "pull"
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    case = MegatronCase(Path(folder))
    own = list(case.ranks())[rank]
    with WeightSender.from_megatron(
        own, case.config, engines=url, token=token, direction=direction
    ) as sender:
        report = sender.update(int(version))
    print(json.dumps({"version": report.version, "bytes": report.bytes}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
