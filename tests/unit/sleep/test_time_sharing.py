"""Where sleep is configured the engine's memory saver is on, and nothing else changes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest

from engine_plugins.settings import Settings
from engine_plugins.sleep.time_sharing import force_memory_saver

SLEEP = Settings(sleep=True)


@dataclass
class Arguments:
    saver: bool = False
    offload_trainer: bool = False
    model: str = "m"


@pytest.mark.parametrize(
    ("settings", "on_cpu", "before", "after"),
    [
        (SLEEP, False, False, True),
        (SLEEP, False, True, True),
        (SLEEP, True, False, False),
        (SLEEP, True, True, True),
        (Settings(), False, False, False),
        (Settings(), False, True, True),
    ],
)
def test_the_switch_alone_is_forced_on(
    settings: Settings, on_cpu: bool, before: bool, after: bool
) -> None:
    """On a GPU, where sleep is configured; what the user turned on stays on."""
    arguments = Arguments(saver=before)
    force_memory_saver(arguments, "saver", settings, on_cpu=on_cpu)
    assert arguments == replace(Arguments(), saver=after)


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reads the log knows what turned it on; a second call finds it done."""
    arguments = Arguments()
    with caplog.at_level(logging.INFO):
        force_memory_saver(arguments, "saver", SLEEP, on_cpu=False)
        force_memory_saver(arguments, "saver", SLEEP, on_cpu=False)
    (said,) = caplog.messages
    assert "ENGINE_PLUGINS_SLEEP" in said
    assert "saver is turned on" in said


def test_the_cpu_is_told_apart_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        force_memory_saver(Arguments(), "saver", SLEEP, on_cpu=True)
    (said,) = caplog.messages
    assert "saver stays off on the CPU" in said
