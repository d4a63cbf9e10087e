"""Run real trainers, three steps each, into one live server in bfloat16; judge every answer.

    python examples/run_trainers.py --engine vllm [--only fsdp2 --only megatron-dp2 ...]

Each trainer is a program of its own in `real_trainers/`, started as torchrun would start it, in
an environment that holds no engine. Only its rank 0 is given the server's token.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from display import console, waiting
from engines import ENGINES, Engine
from live_update_demo import ENVIRONMENT, HERE, free_port, wait_ready
from processes import Child, ChildFailedError, Children

ENVIRONMENTS = HERE.parent / ".venv"
STEPS = 3
SECRET = "ENGINE_PLUGINS_ADMIN_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A program of `real_trainers/`, how many processes it is, and where its imports are."""

    name: str
    program: str
    processes: int
    options: Sequence[str] = ()
    environment: str = "trainers"


TRAINERS = (
    Trainer(name="fsdp2", program="fsdp2.py", processes=2),
    Trainer(name="fsdp2-offload", program="fsdp2.py", processes=2, options=["--offload"]),
    Trainer(name="hsdp", program="fsdp2.py", processes=4, options=["--mesh", "2x2"]),
    Trainer(name="ddp-compiled", program="ddp.py", processes=2),
    Trainer(name="lora", program="lora.py", processes=1),
    Trainer(name="megatron-dp2", program="megatron_core.py", processes=2, environment="megatron"),
    Trainer(
        name="megatron-tp2-dp2",
        program="megatron_core.py",
        processes=4,
        options=["--mesh", "2x2"],
        environment="megatron",
    ),
)


def main() -> int:
    options = parsed_options()
    engine = ENGINES[options.engine]
    chosen = [each for each in TRAINERS if not options.only or each.name in options.only]
    token = secrets.token_urlsafe(24)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != SECRET}
    try:
        with Children(environment) as children:
            try:
                return run(children, engine, chosen, token)
            finally:
                if children.keep:
                    console.print(f"model and logs are in {children.folder}")
    except ChildFailedError as error:
        console.print(f"\n{error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nstopped")
        return 130


def run(children: Children, engine: Engine, chosen: Sequence[Trainer], token: str) -> int:
    """Serve, run the trainers one after the other; 0 if every answer was transformers'."""
    model = children.folder / "model"
    with waiting("making a tiny Qwen3 and its tokenizer"):
        make = [sys.executable, str(HERE / "tiny_model.py"), str(model)]
        children.start("tiny_model", make, engine.environment).wait()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with waiting(f"starting {engine.title} on the CPU, in bfloat16"):
        command = engine.command(model, port=port, dtype="bfloat16")
        server = children.start(engine.title, command, {**engine.environment, SECRET: token})
        wait_ready(server, url)
    failed = []
    for number, trainer in enumerate(chosen):
        began = time.monotonic()
        with waiting(f"{trainer.name} trains and updates"):
            ranks = start(children, trainer, model, url, token, version=number * STEPS + 1)
            answers = answers_of(ranks)
        server.check_runs()
        right = [said["served"] == said["transformers"] for said in answers]
        verdict = "ok" if right == [True] * STEPS else "FAILED"
        if verdict != "ok":
            failed.append(trainer.name)
            children.keep = True  # for the logs
        console.print(
            f"{verdict:>6} {trainer.name} ({trainer.processes} processes, "
            f"{time.monotonic() - began:.0f} s): {[said['text'] for said in answers]}",
            markup=False,
            soft_wrap=True,
        )
    return 1 if failed else 0


def start(
    children: Children, trainer: Trainer, model: Path, url: str, token: str, *, version: int
) -> list[Child]:
    """Start the processes of a trainer."""
    python = ENVIRONMENTS / trainer.environment / "bin" / "python"
    command = [str(python), str(HERE / "real_trainers" / trainer.program)]
    command += ["--model", str(model), "--engine", url, "--version", str(version)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meeting |= {"WORLD_SIZE": str(trainer.processes)}
    return [
        children.start(
            f"{trainer.name}-{rank}",
            [*command, *trainer.options],
            {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            | ({SECRET: token} if rank == 0 else {}),
            piped=rank == 0,
        )
        for rank in range(trainer.processes)
    ]


def answers_of(ranks: Sequence[Child]) -> list[dict[str, list[int] | str]]:
    """What rank 0 says of each step; raises ChildFailedError if a rank fails."""
    # UCX, under NIXL, writes its warnings to stdout.
    answers = [json.loads(line) for line in ranks[0].output if line.startswith("{")]
    for rank in ranks:
        rank.wait()
    return answers


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--engine", choices=list(ENGINES), default="vllm", help="default %(default)s"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=[trainer.name for trainer in TRAINERS],
        help="run this trainer; may be repeated (default: all)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
