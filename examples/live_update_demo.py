"""Change the weights of a running server of vLLM or SGLang while it answers.

Starts the server with a tiny Qwen3 on this machine's CPU, then a trainer as a process of its own
(`trainer.py`) that gives the server the weights of every optimisation step. Ends with the check
that the server says exactly what Hugging Face transformers says on the trainer's weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from display import console, show_check, show_long_request, show_step, waiting
from engines import ENGINES, Engine
from long_request import LongRequest
from processes import Child, ChildFailedError, Children

HERE = Path(__file__).parent
READY_WITHIN_S = 240.0

ENVIRONMENT = {
    # What engine-plugins needs: one secret that the trainer and the server share.
    "ENGINE_PLUGINS_ADMIN_TOKEN": secrets.token_urlsafe(24),
    # The rest keeps this demo on one machine, quiet, and on few cores.
    "UCX_NET_DEVICES": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def main() -> int:
    options = parsed_options()
    engine = ENGINES[options.engine]
    environment = {**ENVIRONMENT, **engine.environment}
    try:
        with Children(environment, keep=options.keep) as children:
            try:
                return demo(children, engine, options.steps)
            except ChildFailedError:
                children.keep = True  # for its logs
                raise
            except KeyboardInterrupt:
                console.print("\ninterrupted: stopping every process of the demo ...")
                raise
            finally:
                if children.keep:
                    console.print(f"model and logs are in {children.folder}")
    except ChildFailedError as error:
        console.print(f"\n{error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130


def demo(children: Children, engine: Engine, steps: int) -> int:
    model = children.folder / "model"
    with waiting("making a tiny Qwen3 and its tokenizer"):
        make = [sys.executable, str(HERE / "tiny_model.py"), str(model)]
        children.start("tiny_model", make).wait()

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    if engine.remark:
        console.print(engine.remark)
    began = time.monotonic()
    with waiting(f"starting {engine.title} on the CPU (about half a minute)"):
        server = children.start(engine.title, engine.command(model, port=port))
        wait_ready(server, url)
    console.print(
        f"{engine.title} (process {server.process.pid}) answers on {url} "
        f"after {time.monotonic() - began:.0f} s\n"
    )

    with waiting("training, and updating the server after every step"):
        trainer = start_trainer(children, model, url, steps)
        return follow(trainer, server, LongRequest(url=url))


def wait_ready(server: Child, url: str) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        server.check_runs()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.2)
    raise ChildFailedError(server, f"was not ready within {READY_WITHIN_S:g} s")


def start_trainer(children: Children, model: Path, url: str, steps: int) -> Child:
    command = [sys.executable, str(HERE / "trainer.py"), "--model", str(model), "--engine", url]
    return children.start("trainer", [*command, "--steps", str(steps)], piped=True)


def follow(trainer: Child, server: Child, long_request: LongRequest) -> int:
    """Show what the trainer reports; returns the exit code of the demo.

    While it trains, another user's long request is in flight.
    """
    steps: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for line in trainer.output:
        if not line.startswith("{"):
            continue  # UCX, under NIXL, writes its warnings to stdout
        said = json.loads(line)
        if "ready" in said:
            long_request.start()
        elif "step" in said:
            steps.append(said)
            show_step(said)
        else:
            checks.append(said)
    server.check_runs()
    trainer.wait()
    long_request.wait()
    console.print()
    served = show_long_request(long_request, steps)
    return 0 if show_check(checks) and served else 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--engine", choices=list(ENGINES), default="vllm", help="default %(default)s"
    )
    parser.add_argument("--steps", type=int, default=5, help="training steps (default %(default)s)")
    parser.add_argument(
        "--keep", action="store_true", help="keep the temporary folder: the model, and the logs"
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
