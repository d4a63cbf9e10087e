"""Change the weights of a running vLLM server while it answers.

Starts `vllm serve` with a tiny Qwen3 on this machine's CPU, then a trainer as a process of its
own (`trainer.py`) that gives the server the weights of every optimisation step. Ends with the
check that the server says exactly what Hugging Face transformers says on the trainer's weights.
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
from long_request import LongRequest
from processes import Child, ChildFailedError, Children

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
READY_WITHIN_S = 240.0

ENVIRONMENT = {
    # What engine-plugins needs: one secret that the trainer and the server share.
    "ENGINE_PLUGINS_ADMIN_TOKEN": secrets.token_urlsafe(24),
    # The rest keeps this demo on one machine, quiet, and on few cores.
    "UCX_NET_DEVICES": "lo",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def main() -> int:
    options = parsed_options()
    try:
        with Children(keep=options.keep) as children:
            try:
                return demo(children, options.steps)
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


def demo(children: Children, steps: int) -> int:
    model = children.folder / "model"
    with waiting("making a tiny Qwen3 and its tokenizer"):
        make = [sys.executable, str(HERE / "tiny_model.py"), str(model)]
        children.start("tiny_model", make, env=ENVIRONMENT).wait()

    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with waiting("starting vllm serve on the CPU (about half a minute)"):
        server = start_server(children, model, url)
    console.print(
        f"vllm serve (process {server.process.pid}) answers on {url} "
        f"after {time.monotonic() - began:.0f} s\n"
    )

    with waiting("training, and updating the server after every step"):
        trainer = start_trainer(children, model, url, steps)
        return follow(trainer, server, LongRequest(url=url))


def start_server(children: Children, model: Path, url: str) -> Child:
    """Start vLLM and wait until it answers.

    The worker extension is all that engine-plugins adds to the command line: it brings the
    admin routes that the trainer calls.
    """
    arguments = {
        "--worker-extension-cls": "vllm_ext.worker_extension.EnginePluginsWorkerExtension",
        "--host": "127.0.0.1",
        "--port": url.rpartition(":")[2],
        "--dtype": "float32",
        "--max-model-len": "4096",
        "--max-num-seqs": "8",
        "--kv-cache-memory-bytes": "64M",
    }
    command = [str(BIN / "vllm"), "serve", str(model), "--enforce-eager"]
    command += [word for pair in arguments.items() for word in pair]
    server = children.start("vllm", command, env=ENVIRONMENT)
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        server.check_runs()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return server
        time.sleep(0.2)
    raise ChildFailedError(server, f"was not ready within {READY_WITHIN_S:g} s")


def start_trainer(children: Children, model: Path, url: str, steps: int) -> Child:
    command = [sys.executable, str(HERE / "trainer.py"), "--model", str(model), "--engine", url]
    return children.start("trainer", [*command, "--steps", str(steps)], env=ENVIRONMENT, piped=True)


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
