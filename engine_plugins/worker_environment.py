"""What processes that are started elsewhere, by Ray above all, must have in their environment.

Processes that an engine starts on its own host inherit it all. Ray's do not: each has what
`runtime_env` says.

    ray.init(runtime_env={"env_vars": forwarded_environment()})
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields

from engine_plugins.settings import ENABLE, PREFIX, SECRETS, Settings

__all__ = ["forwarded_environment"]

_SECRETS = {PREFIX + name.upper() for name in SECRETS}
_SETTINGS = {PREFIX + field.name.upper() for field in fields(Settings)} | {ENABLE}
_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}
_UCX, _UCX_DEVICES = "UCX_", "UCX_NET_DEVICES"


def forwarded_environment(
    environ: Mapping[str, str] = os.environ, *, with_token: bool = False
) -> dict[str, str]:
    """The variables to hand on: our settings, torch's allocator's and the wire's.

    Left out are what is true of one host or server only: where a server's processes meet, and the
    network devices (unless `ENGINE_PLUGINS_NET_DEVICES=inherit` says that they hold everywhere).

    Args:
        environ: the environment of the process that starts the others.
        with_token: hands on the admin token too. Ray shows a job's `runtime_env` to whoever may see
            its dashboard and logs, so a token file on every host is the better way.

    Raises:
        SettingsError: a setting has a value that cannot be used; no worker is to find out.
    """
    settings = Settings.load(environ=environ)
    wanted = _SETTINGS | _ALLOCATOR | {name for name in environ if name.startswith(_UCX)}
    if not with_token:
        wanted -= _SECRETS
    if settings.net_devices != "inherit":
        wanted -= {_UCX_DEVICES}
    return {name: environ[name] for name in sorted(wanted) if environ.get(name)}
