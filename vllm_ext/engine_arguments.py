"""Where vLLM's engine arguments are made whole, of a server that asked for us.

The release is checked, the runtime directory laid out, our hooks installed and sleep mode put on.
vLLM has no plugin point for arguments: `vllm_ext.plugin` wraps the method; remove when it has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from engine_plugins.admin.absent_parts import note_absent
from engine_plugins.admin.runtime_dir import ensure_runtime_dir, join_runtime_dir
from engine_plugins.engine_release import gate_refusal
from engine_plugins.errors import EnginePluginError, UnsupportedError
from engine_plugins.settings import Settings
from engine_plugins.sleep.time_sharing import force_memory_saver
from engine_plugins.worker_environment import forwarded_environment
from vllm_ext.asked import forget_other_server, has_extension
from vllm_ext.hooks import hook_api_process, require_installed, settings_of
from vllm_ext.versions import VLLM

__all__ = ["configured"]

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


def configured(create_config: Callable[[], Any], arguments: EngineArgs) -> Any:
    """Make the configuration of a server that named something of ours, and install what it asks.

    Raises:
        EnginePluginError: it cannot be had with this release, these arguments or settings.
    """
    with _telling_remedies():
        ours = has_extension(arguments.worker_extension_cls)
        settings = settings_of(arguments.additional_config, ours=ours)
        if not ours and settings.prefill_gate == "off":
            forget_other_server()
            return create_config()
        _check_release(settings, ours=ours)
        _install(arguments)
        if ours:
            require_installed()
        on_cpu = current_platform.is_cpu()
        force_memory_saver(arguments, "enable_sleep_mode", settings, on_cpu=on_cpu)
        if on_cpu and settings.prefill_gate != "off":
            _bound_kernels()
        _hand_on_to_ray()
        config = create_config()
        if ours:
            _refuse_parallel(config.parallel_config)
            _refuse_stores(config)
        return config


def _install(arguments: EngineArgs) -> None:
    """Have a runtime directory and the hooks in this process.

    Of several API processes each makes the configuration again, for the server of its parent.
    """
    if arguments._api_process_count > 1 and arguments._api_process_rank >= 0:
        join_runtime_dir()
    else:
        ensure_runtime_dir()
    if (no_gate := gate_refusal()) is not None:
        note_absent("prefill_gate", no_gate.message)
    hook_api_process()


@contextmanager
def _telling_remedies() -> Iterator[None]:
    """Put what to do into the traceback, which is all that vLLM shows of a failed start."""
    try:
        yield
    except EnginePluginError as error:
        if error.remedy and not hasattr(error, "__notes__"):
            error.add_note(f"engine-plugins: {error.remedy}")
        raise


def _check_release(settings: Settings, *, ours: bool) -> None:
    """Refuse a release, or an environment, that what was asked for cannot be had with."""
    if ours:
        VLLM.check(settings)
        _refuse_rust_frontend()
    else:
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
