"""What workers elsewhere get of this environment: all that must be equal, and no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_plugins import forwarded_environment
from engine_plugins.errors import SettingsError
from engine_plugins.settings import Settings

ROOT = Path(__file__).parents[2]
TOKEN = {"ENGINE_PLUGINS_ADMIN_TOKEN": "s3cret"}
FORWARDED = {
    "ENGINE_PLUGINS_ADMIN_TOKEN_FILE": "/etc/tokens",
    "ENGINE_PLUGINS_ALLOW_PRELOAD_ON_BLACKWELL": "1",
    "ENGINE_PLUGINS_MEMORY_SAVER_HOOK_MODE": "torch",
    "ENGINE_PLUGINS_SLEEP": "true",
    "ENGINE_PLUGINS_STALL_TIMEOUT_S": "7",
    "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
    "UCX_TLS": "rc,cuda_copy",
}
LEFT = {
    "ENGINE_PLUGINS_RUNTIME_DIR": "/run/of-one-server",
    "ENGINE_PLUGINS_RUNTIME_OWNER": "17",
    "ENGINE_PLUGINS_STAGING_BYTES": "",
    "HOME": "/home/of-one-host",
    "LD_PRELOAD": "/lib/of-one-host.so",
    "UCX_NET_DEVICES": "mlx5_0:1",
}


def test_settings_allocator_and_wire_are_forwarded_and_nothing_of_one_host_or_server() -> None:
    assert forwarded_environment({**FORWARDED, **LEFT, **TOKEN}) == FORWARDED


def test_the_token_goes_along_only_where_it_is_asked_for() -> None:
    """Ray shows a job's environment."""
    given = {**FORWARDED, **TOKEN}
    assert forwarded_environment(given, with_token=True) == given


def test_network_devices_go_along_where_they_are_said_to_hold_everywhere() -> None:
    given = {"ENGINE_PLUGINS_NET_DEVICES": "inherit", "UCX_NET_DEVICES": "mlx5_0:1"}
    assert forwarded_environment(given) == given


def test_a_setting_that_no_worker_could_read_is_refused_here() -> None:
    with pytest.raises(SettingsError, match="STALL_TIMEOUT_S"):
        forwarded_environment({"ENGINE_PLUGINS_STALL_TIMEOUT_S": "soon"})


CHILD = """
import json, os
from dataclasses import asdict
from engine_plugins.settings import Settings
settings = {name: str(value) for name, value in asdict(Settings.load()).items()}
found = {name: os.environ.get(name) for name in json.loads(os.environ["ASK"])}
print(json.dumps([settings, found]))
"""


def test_a_process_with_a_bare_environment_has_the_settings_of_this_one() -> None:
    """As a worker that Ray starts, whose environment is not this one's."""
    ask = [*FORWARDED, *LEFT, *TOKEN]
    bare = {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "ASK": json.dumps(ask)}
    ended = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**bare, **forwarded_environment({**FORWARDED, **LEFT, **TOKEN})},
        stdout=subprocess.PIPE,
        check=True,
    )
    settings, found = json.loads(ended.stdout)
    here = Settings.load(environ=FORWARDED)
    assert settings == {name: str(getattr(here, name)) for name in settings}
    assert {name: value for name, value in found.items() if value} == FORWARDED
