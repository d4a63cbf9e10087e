"""Ranks of trainers: processes that begin with torch imported, and models if they need them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from tests.support.preloaded import PreloadedProcess, preloaded

__all__ = ["RankProcess", "ranks_of"]

_IMPORTED = (
    "engine_plugins.trainer_sender",
    "safetensors.torch",
    "torch._dynamo",  # fully_shard would import it in each rank
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)
_OF_MODELS = tuple(
    f"transformers.models.{kind}.modeling_{kind}" for kind in ("auto", "qwen3", "qwen3_moe")
)
"""Which take as long again; ranks of no real model do without."""
_QUIET = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


class RankProcess(PreloadedProcess):
    """A process that runs a module, and is spoken with by lines.

    Args:
        module: to run, with `arguments`.
        environment: what is added to this process's own.
        of_models: whether it needs transformers' models.

    Attributes:
        stdin: what it reads.
        stdout: what it prints.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        of_models: bool = False,
    ) -> None:
        to_read, to_it = os.pipe()
        from_it, to_print = os.pipe()
        super().__init__(
            preloaded(*_IMPORTED, *(_OF_MODELS if of_models else ()), **_QUIET),
            ["-m", module, *arguments],
            environment={**os.environ, **_QUIET, **(environment or {})},
            files=(to_read, to_print, 2),
        )
        os.close(to_read)
        os.close(to_print)
        self.stdin, self.stdout = open(to_it, "w"), open(from_it)  # noqa: SIM115 - closed by end

    def end(self) -> None:
        """Kill it if it still runs."""
        self.kill()
        self.wait(10)
        self.stdout.close()
        self.stdin.close()


@contextmanager
def ranks_of(module: str, arguments: Sequence[Sequence[str]]) -> Iterator[list[RankProcess]]:
    """A process for each list of arguments, for as long as a context lasts."""
    with ExitStack() as stack:
        ranks = []
        for own in arguments:
            ranks.append(RankProcess(module, *own, of_models=True))
            stack.callback(ranks[-1].end)
        yield ranks
