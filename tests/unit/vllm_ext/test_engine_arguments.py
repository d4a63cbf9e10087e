"""vLLM's arguments where sleep is configured, in vLLM's own function that makes them whole."""

from __future__ import annotations

import json
import logging
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ECTransferConfig, KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform
from vllm.ray.ray_env import get_env_vars_to_copy

from engine_plugins.admin.runtime_dir import RUNTIME_DIR
from engine_plugins.admin.shared_state import create_runtime_dir
from engine_plugins.errors import SettingsError, UnsupportedError
from tests.support.megatron_hf import dense_config
from tests.support.vllm_server import EXTENSION
from tests.unit.vllm_ext.test_kv_scales import SERVED
from vllm_ext import asked
from vllm_ext.engine_arguments import _refuse_stores
from vllm_ext.plugin import watch_arguments

SLEEP, RAY_COPIES = "ENGINE_PLUGINS_SLEEP", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


@pytest.fixture(autouse=True)
def _hooked(as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched twice, as plugins are loaded more than once."""
    monkeypatch.delenv(SLEEP, raising=False)
    monkeypatch.setenv(RAY_COPIES, "MY_OWN")
    watch_arguments()
    once = EngineArgs.create_engine_config
    watch_arguments()
    assert EngineArgs.create_engine_config is once


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """A model that can be configured, without weights."""
    served = {key: value for key, value in SERVED.items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps({**dense_config(), **served}))
    return {"model": str(tmp_path), "skip_tokenizer_init": True, "max_model_len": 64}


def test_on_the_cpu_sleep_mode_stays_off(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """VLLM refuses it there; the start goes well and the log says what does it."""
    monkeypatch.setenv(SLEEP, "true")
    ours = logging.getLogger("engine_plugins.sleep.time_sharing")
    monkeypatch.setattr(ours, "propagate", False)  # whatever becomes of the loggers above it
    monkeypatch.setattr(ours, "handlers", [caplog.handler])
    with caplog.at_level(logging.INFO, logger=ours.name):
        made = AsyncEngineArgs(**arguments, worker_extension_cls=EXTENSION)
        config = made.create_engine_config()
    assert config.model_config.enable_sleep_mode is False
    assert any("enable_sleep_mode stays off on the CPU" in said for said in caplog.messages)


@pytest.mark.parametrize("by", ["environment", "additional_config"])
def test_on_a_gpu_sleep_mode_is_on_before_anything_is_derived(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Shown by vLLM's own answer: this machine has no platform that it could sleep on."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    if by == "environment":
        monkeypatch.setenv(SLEEP, "true")
    else:
        arguments["additional_config"] = {"engine_plugins": {"sleep": True}}
    made = AsyncEngineArgs(**arguments, worker_extension_cls=EXTENSION)
    with pytest.raises(ValueError, match="Sleep mode is not supported"):
        made.create_engine_config()
    assert made.enable_sleep_mode is True


def test_without_sleep_arguments_stay_as_they_are(arguments: dict[str, Any]) -> None:
    made = AsyncEngineArgs(**arguments)
    before = dict(vars(made))
    assert made.create_engine_config().model_config.enable_sleep_mode is False
    assert made.enable_sleep_mode is before["enable_sleep_mode"] is False


def test_workers_that_ray_starts_are_given_our_settings(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vLLM's own list of what it copies, which the user may have begun."""
    monkeypatch.setenv("ENGINE_PLUGINS_STALL_TIMEOUT_S", "7")
    monkeypatch.setenv("ENGINE_PLUGINS_ADMIN_TOKEN", "s3cret")
    monkeypatch.setenv("MY_OWN", "1")
    AsyncEngineArgs(**arguments, worker_extension_cls=EXTENSION).create_engine_config()
    copied = get_env_vars_to_copy()
    assert {"MY_OWN", "ENGINE_PLUGINS_STALL_TIMEOUT_S"} <= copied
    assert "ENGINE_PLUGINS_ADMIN_TOKEN" not in copied


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"engine_plugins": {"admin_token": "s3cret"}}, "admin_token is in the engine's"),
        ({"engine_plugins": {"ADMIN-TOKEN": "s3cret"}}, "ADMIN-TOKEN is in the engine's"),
        ({"engine-plugins": {"admin_token": "s3cret"}}, "engine-plugins, which nobody reads"),
        ({"ENGINE_PLUGINS_ADMIN_TOKEN": "s3cret"}, "ADMIN_TOKEN, which nobody reads"),
        ({"engine_plugins": "s3cret"}, "is a str"),
        ({"engine_plugins": {"staging_bytes": -1}}, "STAGING_BYTES"),
    ],
)
def test_a_setting_that_cannot_be_ends_the_start(
    arguments: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    """With what to do in the traceback, and never with a secret."""
    made = AsyncEngineArgs(**arguments, additional_config=config)
    with pytest.raises(SettingsError, match=said) as caught:
        made.create_engine_config()
    shown = "".join(traceback.format_exception(caught.value))
    assert "\nengine-plugins: " in shown
    assert "s3cret" not in shown


@pytest.mark.parametrize("field", ["data_parallel_size", "pipeline_parallel_size", "nnodes"])
def test_what_an_update_would_reach_a_part_of_is_refused(
    arguments: dict[str, Any], field: str
) -> None:
    """With our extension; other vLLM servers of the environment are none of our business."""
    arguments |= {"tensor_parallel_size": 2, field: 2}  # of which several hosts have a part each
    plain = AsyncEngineArgs(**arguments).create_engine_config()
    assert getattr(plain.parallel_config, field) == 2
    made = AsyncEngineArgs(**arguments, worker_extension_cls=EXTENSION)
    with pytest.raises(UnsupportedError, match=f"--{field.replace('_', '-')} 2") as caught:
        made.create_engine_config()
    shown = "".join(traceback.format_exception(caught.value))
    assert "\nengine-plugins: serve with tensor parallelism" in shown


@pytest.mark.parametrize("ours", [True, False])
def test_the_api_server_in_rust_is_refused_where_workers_are_ours(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    """It would have no admin routes, and vLLM's own would be open on it."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    made = AsyncEngineArgs(**arguments, worker_extension_cls=EXTENSION if ours else "")
    if not ours:
        made.create_engine_config()
        return
    with pytest.raises(UnsupportedError, match="VLLM_USE_RUST_FRONTEND") as caught:
        made.create_engine_config()
    assert "\nengine-plugins: unset it" in "".join(traceback.format_exception(caught.value))


def _connector(name: str, **more: object) -> dict[str, object]:
    return {"kv_connector": name, "kv_role": "kv_both", **more}


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("kv_transfer_config", _connector("ExampleConnector"), "ExampleConnector"),
        ("kv_transfer_config", _connector("OffloadingConnector"), "OffloadingConnector"),
        (
            "kv_transfer_config",
            _connector(
                "MultiConnector",
                kv_connector_extra_config={"connectors": [_connector("ExampleConnector")]},
            ),
            "MultiConnector",
        ),
        (
            "kv_transfer_config",
            _connector("Mine", kv_connector_module_path="tests.support.no_such"),
            "Mine",
        ),
        (
            "ec_transfer_config",
            {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"},
            "ECExampleConnector",
        ),
    ],
)
def test_what_is_kept_outside_the_engine_is_refused(
    arguments: dict[str, Any], option: str, value: dict[str, object], named: str
) -> None:
    """It would come back after an update, computed with other weights."""
    config = AsyncEngineArgs(**arguments).create_engine_config()
    kind = KVTransferConfig if option == "kv_transfer_config" else ECTransferConfig
    setattr(config, option, kind(**value))
    with pytest.raises(UnsupportedError, match=f"--{option.replace('_', '-')}: {named} keeps"):
        _refuse_stores(config)


def test_a_store_ends_the_start_where_workers_are_ours(arguments: dict[str, Any]) -> None:
    """With what to do in the traceback; other servers may have one."""
    arguments["kv_transfer_config"] = KVTransferConfig(
        kv_connector="ExampleConnector", kv_role="kv_both"
    )
    plain = AsyncEngineArgs(**arguments).create_engine_config()
    assert plain.kv_transfer_config is not None
    made = AsyncEngineArgs(**arguments, worker_extension_cls=EXTENSION)
    with pytest.raises(UnsupportedError, match="ExampleConnector keeps") as caught:
        made.create_engine_config()
    assert "\nengine-plugins: serve without it" in "".join(traceback.format_exception(caught.value))


KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize(
    ("gate", "chosen", "expected"),
    [
        ("off", None, None),
        ("observe", None, "128"),
        ("enforce", None, "128"),
        ("enforce", "9", "9"),
    ],
)
def test_kernels_by_shape_are_bounded_where_memory_is_watched(
    arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    gate: str,
    chosen: str | None,
    expected: str | None,
) -> None:
    """For this engine's processes, which inherit it; off is off, and a choice is respected."""
    monkeypatch.setenv(KERNELS, chosen or "")  # so that it is as before afterwards
    if chosen is None:
        monkeypatch.delenv(KERNELS)
    monkeypatch.setenv("ENGINE_PLUGINS_PREFILL_GATE", gate)
    AsyncEngineArgs(**arguments).create_engine_config()
    assert os.environ.get(KERNELS) == expected


@pytest.mark.parametrize(
    ("more", "server"),
    [
        ({}, "none"),
        ({"worker_extension_cls": EXTENSION}, "its own"),
        ({"worker_extension_cls": EXTENSION, "_api_process_count": 2}, "its parent's"),
        (
            {
                "worker_extension_cls": EXTENSION,
                "_api_process_count": 2,
                "_api_process_rank": -1,
            },
            "its own",
        ),
    ],
    ids=["not-ours", "ours", "one-of-two-apis", "above-two-apis"],
)
def test_a_server_of_a_launcher_has_its_own_runtime_directory(
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
    server: str,
) -> None:
    """Whatever was inherited from a launcher that is a server itself, or has configured one."""
    create_runtime_dir(tmp_path)
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path))
    monkeypatch.setenv("ENGINE_PLUGINS_RUNTIME_OWNER", str(os.getppid()))
    AsyncEngineArgs(**arguments, **more).create_engine_config()
    found = os.environ.get(RUNTIME_DIR)
    assert server == {None: "none", str(tmp_path): "its parent's"}.get(found, "its own")


def test_the_names_in_a_servers_environment_are_the_same_everywhere() -> None:
    """The plugin's own are written out, since it imports nothing of ours."""
    assert asked.RUNTIME_DIR == RUNTIME_DIR
