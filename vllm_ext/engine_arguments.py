"""Where vLLM's engine arguments are made whole: the release is checked, sleep mode put on.

A patch of `EngineArgs.create_engine_config`, idempotent. vLLM has no plugin point for arguments;
remove when it has.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from engine_plugins.errors import EnginePluginError, UnsupportedError
from engine_plugins.settings import Settings
from engine_plugins.sleep.time_sharing import force_memory_saver
from engine_plugins.worker_environment import forwarded_environment
from vllm_ext.hooks import has_extension, require_installed, settings_of
from vllm_ext.versions import VLLM

__all__ = ["hook_engine_arguments"]

_HOOKED = "engine_plugins_hooked"
_UNSUPPORTED = {
    "data_parallel_size": "data parallelism in one server",
    "pipeline_parallel_size": "pipeline parallelism",
    "nnodes": "a server on several hosts",
}
"""Sizes of vLLM's that must be 1."""
_STORES = {"kv_transfer_config": "kv_connector", "ec_transfer_config": "ec_connector"}
"""What configures a connector of vLLM's, and where that holds its name."""
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
_KERNELS, KERNELS_KEPT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 128


def hook_engine_arguments() -> None:
    """Wrap the one function that every vLLM makes its configuration with."""
    original = EngineArgs.create_engine_config
    if hasattr(original, _HOOKED):
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        with _telling_remedies():
            ours = has_extension(self.worker_extension_cls)
            settings = settings_of(self.additional_config, ours=ours)
            _check(settings, ours=ours)
            on_cpu = current_platform.is_cpu()
            force_memory_saver(self, "enable_sleep_mode", settings, on_cpu=on_cpu)
            if on_cpu and settings.prefill_gate != "off":
                _bound_kernels()
            _hand_on_to_ray()
            config = original(self, *args, **kwargs)
            if ours:
                _refuse_parallel(config.parallel_config)
                _refuse_stores(config)
            return config

    setattr(create_engine_config, _HOOKED, True)
    EngineArgs.create_engine_config = create_engine_config


@contextmanager
def _telling_remedies() -> Iterator[None]:
    """Put what to do into the traceback, which is all that vLLM shows of a failed start."""
    try:
        yield
    except EnginePluginError as error:
        if error.remedy and not hasattr(error, "__notes__"):
            error.add_note(f"engine-plugins: {error.remedy}")
        raise


def _check(settings: Settings, *, ours: bool) -> None:
    """Refuse a release, or an environment, that what was asked for cannot be had with."""
    if ours:
        VLLM.check(settings)
        require_installed()
        _refuse_rust_frontend()
    elif settings.prefill_gate != "off":
        VLLM.check_gate(settings)


def _refuse_parallel(parallel: Any) -> None:
    """Refuse what an update would reach a part of, and report as installed.

    Of several data parallel engines vLLM gives the answers of the first alone; neither pipeline
    parallelism nor several hosts have been run.
    """
    for field, what in _UNSUPPORTED.items():
        if getattr(parallel, field) > 1:
            raise UnsupportedError(
                f"--{field.replace('_', '-')} {getattr(parallel, field)}: {what} is not supported "
                "with engine-plugins",
                remedy="serve with tensor parallelism on one host, and start one server per "
                "replica",
            )


def _refuse_stores(config: Any) -> None:
    """Refuse connectors to KV, or to encoders' outputs, that are kept outside the engine.

    After an update they give back what older weights computed. Those that hash as vLLM does look
    at the mark of the weights, but not for requests in flight: of vLLM 0.32's OffloadingConnector
    a preempted request keeps the keys that it had before the update. The others go by tokens or
    by images alone, or take what another server computed.
    """
    for field, option in _STORES.items():
        store = getattr(config, field)
        connector = None if store is None else getattr(store, option)
        if connector is not None:
            raise UnsupportedError(
                f"--{field.replace('_', '-')}: {connector} keeps what the model computed outside "
                "the engine, and would give it back after the weights have changed",
                remedy="serve without it (--kv-offloading-size makes one too)",
            )


def _refuse_rust_frontend() -> None:
    """Refuse vLLM's API server in Rust: it loads no plugin, and its own routes stay open."""
    if envs.VLLM_USE_RUST_FRONTEND:
        raise UnsupportedError(
            "VLLM_USE_RUST_FRONTEND: vLLM's Rust API server has no admin routes",
            remedy="unset it, or start vLLM without our worker extension",
        )


def _bound_kernels() -> None:
    """Have oneDNN keep fewer kernels than the 1,024 of its default, unless somebody chose.

    It makes one for each length of a prompt and each kind of layer. With ever new lengths an engine
    then grows by hundreds of MiB that no step gives back.
    """
    os.environ.setdefault(_KERNELS, str(KERNELS_KEPT))


def _hand_on_to_ray() -> None:
    """VLLM copies some variables to workers that Ray starts; ours are added to the list."""
    listed = {name for name in os.environ.get(_RAY_COPIES, "").split(",") if name}
    os.environ[_RAY_COPIES] = ",".join(sorted(listed | forwarded_environment().keys()))
