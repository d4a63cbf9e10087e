"""The flags `--engine-plugins-*` of an SGLang server.

Each setting of `engine_plugins.settings` has one; any of them turns the plugin on, and
`--engine-plugins-enable` is for those with nothing to set. They are taken out of the command line
before SGLang reads it and handed to every process through the environment. Where there is no
command line, `ENGINE_PLUGINS_ENABLE=1` in the environment does the same.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn

from sglang.srt.environ import envs

from engine_plugins.admin.absent_parts import note_absent
from engine_plugins.engine_release import GATE, UPDATES, gate_refusal
from engine_plugins.errors import EnginePluginError, SettingsError
from engine_plugins.prefill_gate.engine_gate import require_cap
from engine_plugins.settings import ENABLE, PREFIX, SECRETS, Settings
from sglang_ext.hooks import missing
from sglang_ext.memory_saver import (
    is_on_cpu,
    prepare_memory_saver,
    require_memory_saver,
    settle_hook_mode,
)
from sglang_ext.versions import SGLANG

logger = logging.getLogger(__name__)

__all__ = [
    "FLAG",
    "check_launch",
    "prepare_server_args",
    "refuse_to_start",
    "refuse_unsupported",
    "take_flags",
]

FLAG = "--engine-plugins"
_STORE = "a cache that may give back what older weights computed"
_UNSUPPORTED: dict[str, tuple[object, str]] = {
    "pp_size": (1, "pipeline parallelism"),
    "dp_size": (1, "data parallelism in one server; start one server per replica"),
    "attn_dp_size": (1, "data parallel attention"),
    "nnodes": (1, "a server on several hosts"),
    "grpc_mode": (False, "the gRPC server"),
    "smg_grpc_mode": (False, "the gRPC server"),
    # Beside the HTTP server; it takes no key, and pauses the engine and updates it from disk.
    "grpc_port": (None, "the gRPC server"),
    "checkpoint_engine_wait_weights_before_ready": (
        False,
        "a server that waits for its first weights by SGLang's own routes, which are closed here,",
    ),
    "encoder_only": (False, "an encoder-only server"),
    "use_ray": (False, "Ray"),
    "disaggregation_mode": ("null", "disaggregated prefill and decode"),
    "language_only": (False, "taking embeddings from an encoder server, whose weights stay old,"),
    # HiCache and its storage key KV by a request's extra_key, where our mark of the weights is.
    "enable_lmcache": (False, _STORE),
    "enable_flexkv": (False, _STORE),
    "enable_mm_global_cache": (False, _STORE),
    "radix_cache_backend": (None, _STORE),
}
"""Settings of SGLang's with the one value that our hooks were probed with."""


def prepare_server_args(original: Callable[..., Any], argv: Sequence[str]) -> Any:
    """Around SGLang's function of this name."""
    rest = take_flags(argv)
    _check_release()
    arguments = original(rest)
    refuse_unsupported(arguments)
    with _refusing():
        prepare_memory_saver(arguments)
        _require_cap(arguments)
    return arguments


def check_launch(arguments: Any) -> None:
    """Check what an engine is started with, whoever has put it together.

    SGLang has resolved its arguments by now, and takes no change to them.
    """
    _check_release()
    if (no_gate := gate_refusal()) is not None:
        note_absent("prefill_gate", no_gate.message)
    refuse_unsupported(arguments)
    with _refusing():
        require_memory_saver(arguments)
        settle_hook_mode(arguments)
        _require_cap(arguments)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except EnginePluginError as error:
        refuse_to_start(f"{error.message}; {error.remedy}")


def _require_cap(arguments: Any) -> None:
    if is_on_cpu(arguments):  # of a GPU its ranks know the size
        require_cap(Settings.load())


def refuse_to_start(why: str) -> NoReturn:
    """End the process with one line that says why."""
    raise SystemExit(f"engine-plugins: error: {why}")


def take_flags(argv: Sequence[str]) -> list[str]:
    """Put our flags into the environment and return the others.

    A bad one ends the process as a bad flag of any program does.
    """
    parser = _parser()
    given, rest = parser.parse_known_args(list(argv))
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        return rest
    for argument in rest:
        # Without what follows a `=`: it may be a secret.
        flag = argument.partition("=")[0].replace("_", "-")
        if flag.startswith(FLAG):
            parser.error(f"there is no flag {flag}; {_instead_of(flag, parser)}")
    values = {name: value for name, value in vars(given).items() if name != "enable"}
    try:
        Settings.load(values)
    except SettingsError as error:
        parser.error(error.message)
    os.environ.update({PREFIX + name.upper(): value for name, value in values.items()})
    os.environ[ENABLE] = "1"  # a launcher may hand its arguments to a process of its own
    return rest


def _instead_of(flag: str, parser: argparse.ArgumentParser) -> str:
    if flag.removeprefix(f"{FLAG}-").replace("-", "_") in SECRETS:
        return (
            "others can read a command line: choose a new token, and give it by "
            f"{PREFIX}ADMIN_TOKEN or {PREFIX}ADMIN_TOKEN_FILE"
        )
    return f"there are: {', '.join(_flags(parser))}"


@functools.cache
def _check_release() -> None:
    """Once in a process: it reads all that we rely on in SGLang's sources."""
    settings = Settings.load()
    try:
        SGLANG.check(settings)
    except EnginePluginError as error:
        refuse_to_start(f"{error.message}; {error.remedy}")
    if lost := [*missing(UPDATES), *(missing(GATE) if settings.prefill_gate != "off" else [])]:
        refuse_to_start(
            f"SGLang {SGLANG.version} did not take the hooks on {', '.join(lost)} (its log says "
            f"why); engine-plugins was made for SGLang {', '.join(SGLANG.probed)}"
        )
    if warning := SGLANG.warning():
        logger.warning(warning)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="engine-plugins",
        usage="... [--engine-plugins-enable] [--engine-plugins-SETTING VALUE ...]",
        description="Flags of engine-plugins; any of them turns it on.",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(f"{FLAG}-enable", dest="enable", action="store_true", help="turn it on")
    for setting in fields(Settings):
        if setting.name not in SECRETS:
            parser.add_argument(
                f"{FLAG}-{setting.name.replace('_', '-')}",
                dest=setting.name,
                metavar=str(setting.type).partition(" ")[0],
                help=f"as {PREFIX}{setting.name.upper()}; default {setting.default}",
            )
    return parser


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [action.option_strings[0] for action in parser._actions]


def refuse_unsupported(arguments: Any) -> None:
    """End the process, where SGLang was asked for what our hooks cannot serve."""
    for name, (wanted, what) in _UNSUPPORTED.items():
        value = getattr(arguments, name, wanted)
        if value not in (wanted, None):
            refuse_to_start(f"--{name.replace('_', '-')} {value}: {what} is not supported yet")
    if (port := envs.SGLANG_GRPC_PORT.get()) is not None:  # SGLang reads it later than this
        refuse_to_start(f"SGLANG_GRPC_PORT {port}: the gRPC server is not supported yet")
    if envs.SGLANG_RUST_SERVER.get():
        refuse_to_start("SGLANG_RUST_SERVER: SGLang's Rust server is not supported yet")
