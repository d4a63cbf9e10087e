"""How the demo starts each engine: all that differs between them is here.

Once it runs, either server answers `/v1/completions` and `/admin/v1/*` in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENGINES", "Engine"]

BIN = Path(sys.executable).parent
SGLANG_SHIMS = Path(__file__).parents[1] / "tests" / "support" / "sglang_shims"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A server on this machine's CPU, on few cores.

    Attributes:
        title: what the demo calls it.
        start: its program; the folder of the model comes next.
        plugin_flags: what engine-plugins adds to the command line.
        flags: the rest of it.
        environment: variables that it needs here.
        remark: what is not as its users have it.
    """

    title: str
    start: Sequence[str]
    plugin_flags: str
    flags: str
    environment: Mapping[str, str]
    remark: str = ""

    def command(self, model: Path, *, port: int, dtype: str = "float32") -> list[str]:
        """The command line that serves a folder on a port of loopback."""
        common = f"--host 127.0.0.1 --port {port} --dtype {dtype}"
        return [*self.start, str(model), *f"{self.plugin_flags} {common} {self.flags}".split()]


ENGINES = {
    "vllm": Engine(
        title="vLLM",
        start=[str(BIN / "vllm"), "serve"],
        plugin_flags=(
            "--worker-extension-cls vllm_ext.worker_extension.EnginePluginsWorkerExtension"
        ),
        flags="--enforce-eager --max-model-len 4096 --max-num-seqs 8 --kv-cache-memory-bytes 64M",
        environment={
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
    ),
    "sglang": Engine(
        title="SGLang",
        start=[sys.executable, "-m", "sglang.launch_server", "--model-path"],
        plugin_flags="--engine-plugins-enable",
        flags=(
            "--device cpu --attention-backend torch_native --max-running-requests 8 "
            "--max-total-tokens 8192 --skip-server-warmup --sleep-on-idle"
        ),
        environment={"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(SGLANG_SHIMS)},
        remark="real SGLang, stubbed kernel import: PyPI has no build of its kernels for CPUs",
    ),
}
