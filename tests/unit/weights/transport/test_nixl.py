"""What is NIXL's alone: being absent, and what an agent does to the process that hosts it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engine_plugins.errors import NotConfiguredError, TransportError
from engine_plugins.weights.transport import nixl

ROOT = Path(__file__).parents[4]


def run(script: str) -> str:
    """What a fresh interpreter prints for the script."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_nixl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing our module works without NIXL; only making an agent needs it."""

    def refuse(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    nixl._bindings.cache_clear()
    try:
        with pytest.raises(NotConfiguredError, match="nixl_cu12") as caught:
            nixl.NixlTransport("engine")
    finally:
        nixl._bindings.cache_clear()
    assert "pip install" in caught.value.remedy


def test_ucx_settings_that_cannot_work_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory alone cannot notice dead peers, so UCX refuses it."""
    monkeypatch.setenv("UCX_TLS", "sm,self")
    with pytest.raises(TransportError, match="starting UCX") as caught:
        nixl.NixlTransport("engine")
    assert "UCX_TLS" in caught.value.remedy


def test_a_home_that_nixl_may_not_read_is_explained() -> None:
    """As in a container with an arbitrary uid. For a path that is too long NIXL raises the same.

    NIXL reads its configuration once for each process.
    """
    printed = run(
        """
        import os
        from engine_plugins.errors import NotConfiguredError
        from engine_plugins.weights.transport.nixl import NixlTransport

        os.environ["HOME"] = "/" + "x" * 300
        try:
            NixlTransport("engine")
        except NotConfiguredError as error:
            print("configuration in HOME" in error.message, "set HOME" in error.remedy)
        """
    )
    assert printed == "True True\n"


def test_the_devices_of_one_agent_are_not_those_of_processes_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trainer may start engines, which find their own network."""
    for before in ("lo", None):
        if before is None:
            monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
        else:
            monkeypatch.setenv("UCX_NET_DEVICES", before)
        nixl.NixlTransport("engine", net_devices="lo").close()
        assert os.environ.get("UCX_NET_DEVICES") == before
        with pytest.raises(TransportError, match="starting UCX"):
            nixl.NixlTransport("engine", net_devices="nosuch0")
        assert os.environ.get("UCX_NET_DEVICES") == before


def test_an_idle_agent_costs_no_core_and_takes_no_signal() -> None:
    """NIXL's own wrapper spins a core for ever; UCX by default catches SIGHUP and prints."""
    printed = run(
        """
        import signal, time
        from engine_plugins.weights.transport.nixl import NixlTransport

        def caught():
            with open("/proc/self/status") as status:
                return next(line.split()[1] for line in status if line.startswith("SigCgt"))

        transport = NixlTransport("idle")
        began = time.process_time()
        time.sleep(1)
        print(time.process_time() - began, int(caught(), 16) & (1 << (signal.SIGHUP - 1)))
        """
    )
    cpu_s, sighup = printed.split()
    assert float(cpu_s) < 0.3
    assert sighup == "0"


def test_a_process_that_never_closes_its_agent_ends_by_itself() -> None:
    """An engine may be stopped at any time; the progress thread must not hold it."""
    printed = run(
        """
        import numpy
        from engine_plugins.weights.transport.nixl import NixlTransport

        transport = NixlTransport("careless")
        memory = numpy.zeros(4096, dtype=numpy.uint8)
        transport.register(memory.ctypes.data, 4096, -1)
        print(len(transport.metadata()) > 0)
        """
    )
    assert printed == "True\n"
