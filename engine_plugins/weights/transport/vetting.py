"""Metadata of peers is tried in a throwaway process before the engine loads it.

NIXL and UCX parse it without looking at lengths first: one wrong byte ends the process with
SIGSEGV or SIGABRT, or holds it for good. Here that costs a child, and the peer is named.
A child tries all new peers of a connect; what came through once is not tried again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engine_plugins.errors import PeerError, TransportError

__all__ = ["DEADLINE_S", "vet"]

logger = logging.getLogger(__name__)

DEADLINE_S = 20
"""For one child, by its own alarm; it takes half a second, and a few ms for each peer."""
_BEYOND_S = 5.0
"""Then it is killed from here."""
_CHILD = Path(__file__).with_name("vetting_child.py")
_MOST_KEPT = 65_536
_through: set[bytes] = set()
"""Checksums of metadata that came through."""


def vet(peers: Sequence[tuple[str, bytes]], *, bindings_file: str, net_devices: str | None) -> None:
    """Refuse metadata that would crash or hang a process that loads it.

    Args:
        peers: agents' names, each with its metadata; a name may come with several.
        bindings_file: NIXL's extension module.
        net_devices: `UCX_NET_DEVICES` of the agent that is to meet them; None as it stands.

    Raises:
        PeerError: loading one ends a process, or does not come to an end; the text names it.
        TransportError: no child could be started, or it ended before it came to any peer.
    """
    news = {hashlib.sha256(metadata).digest(): (agent, metadata) for agent, metadata in peers}
    for digest in news.keys() & _through:
        del news[digest]
    if not news:
        return
    _try(list(news.values()), bindings_file, net_devices)
    if len(_through) + len(news) > _MOST_KEPT:
        _through.clear()
    _through.update(news)


def _try(peers: Sequence[tuple[str, bytes]], bindings_file: str, net_devices: str | None) -> None:
    sizes = [len(metadata) for _, metadata in peers]
    head = json.dumps({"bindings": bindings_file, "sizes": sizes, "deadline_s": DEADLINE_S})
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", str(_CHILD)],
            input=b"".join([head.encode(), b"\n", *(metadata for _, metadata in peers)]),
            capture_output=True,
            env=_environment(net_devices),
            timeout=DEADLINE_S + _BEYOND_S,
            check=False,
        )
        said, noise, ended = child.stdout, child.stderr, _how(child.returncode)
    except subprocess.TimeoutExpired as error:
        said, noise = error.stdout or b"", error.stderr or b""
        ended = _how(-signal.SIGALRM)
    except OSError as error:
        raise TransportError(
            f"no process could be started to try the metadata of {len(peers)} peers in: {error}; "
            "none of it was loaded",
            remedy="allow this server's user another process, and some memory for it",
        ) from error
    marks = said.split()
    if marks[-1:] == [b"end"]:
        return
    last = noise.decode(errors="replace").strip().splitlines()[-1:]
    logger.warning("the process that tried peers' metadata %s: %s", ended, " ".join(last))
    if not marks:
        raise TransportError(
            f"the process that tries peers' metadata {ended} before it came to any: "
            f"{' '.join(last)}",
            remedy="see the lines of NIXL and UCX in the server's log; nothing was loaded",
        )
    agent, metadata = peers[int(marks[-1])]
    raise PeerError(
        f"{agent}: its {len(metadata)} bytes of metadata are hostile or damaged: "
        f"a process that loaded them {ended}. This engine did not load them",
        remedy="publish the source again from the process that made it; if it repeats, use the "
        "same release of NIXL in trainer and engine",
    )


def _environment(net_devices: str | None) -> dict[str, str]:
    """The engine's, without what would cost the child time or bring the engine's GPU into it."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "UCX_HANDLE_ERRORS": "none"}
    environment.pop("LD_PRELOAD", None)  # memory savers
    if net_devices is not None:
        environment["UCX_NET_DEVICES"] = net_devices
    return environment


def _how(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with status {returncode}"
    if returncode == -signal.SIGALRM:
        return f"came to no end within {DEADLINE_S} s"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"
