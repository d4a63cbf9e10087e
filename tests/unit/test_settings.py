"""Settings come from the environment; what an engine's own configuration says goes above it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from engine_plugins.errors import SettingsError
from engine_plugins.settings import PREFIX, SECRETS, Settings


def test_every_setting_is_read_from_the_environment_in_its_own_type() -> None:
    """Strings become numbers and paths."""
    environ = {
        "ENGINE_PLUGINS_ADMIN_TOKEN": "t",
        "ENGINE_PLUGINS_ADMIN_TOKEN_FILE": "/etc/tokens",
        "ENGINE_PLUGINS_MAX_BODY_BYTES": "10",
        "ENGINE_PLUGINS_MAX_MANIFEST_BYTES": "20",
        "ENGINE_PLUGINS_MAX_MANIFEST_ENTRIES": "30",
        "ENGINE_PLUGINS_STALL_TIMEOUT_S": "0.5",
        "ENGINE_PLUGINS_STAGING_BYTES": "40",
        "ENGINE_PLUGINS_DIRECT_LANDING": "false",
        "ENGINE_PLUGINS_SOURCE_POLICY": "nearest",
        "ENGINE_PLUGINS_EXPECTED_LINK_GBPS": "45",
        "ENGINE_PLUGINS_NET_DEVICES": "mlx5_0:1",
        "ENGINE_PLUGINS_SLEEP": "true",
        "ENGINE_PLUGINS_MEMORY_SAVER_HOOK_MODE": "torch",
        "ENGINE_PLUGINS_ALLOW_PRELOAD_ON_BLACKWELL": "1",
        "ENGINE_PLUGINS_SLEEP_DIR": "/var/sleep",
        "ENGINE_PLUGINS_RESIDUAL_POLICY": "observe",
        "ENGINE_PLUGINS_MAX_RESIDUAL_GPU_MEM_GIB": "2.5",
        "ENGINE_PLUGINS_RESIDUAL_OVER_BASELINE_GIB": "0.5",
        "ENGINE_PLUGINS_PREFILL_GATE": "observe",
        "ENGINE_PLUGINS_PREFILL_CAP_BYTES": "50",
        "ENGINE_PLUGINS_PREFILL_MARGIN_QUANTILE": "0.9",
        "ENGINE_PLUGINS_PREFILL_MARGIN_BYTES": "60",
        "ENGINE_PLUGINS_PREFILL_CALIBRATION_DIR": "/measured",
        "PATH": "/bin",
    }
    settings = Settings.load(environ=environ)
    assert settings == Settings(
        admin_token="t",
        admin_token_file=Path("/etc/tokens"),
        max_body_bytes=10,
        max_manifest_bytes=20,
        max_manifest_entries=30,
        stall_timeout_s=0.5,
        staging_bytes=40,
        direct_landing=False,
        source_policy="nearest",
        expected_link_gbps=45.0,
        net_devices="mlx5_0:1",
        sleep=True,
        memory_saver_hook_mode="torch",
        allow_preload_on_blackwell=True,
        sleep_dir=Path("/var/sleep"),
        residual_policy="observe",
        max_residual_gpu_mem_gib=2.5,
        residual_over_baseline_gib=0.5,
        prefill_gate="observe",
        prefill_cap_bytes=50,
        prefill_margin_quantile=0.9,
        prefill_margin_bytes=60,
        prefill_calibration_dir=Path("/measured"),
    )
    assert len(environ) - 1 == len(fields(Settings)), "a new setting belongs in this test"
    for field in fields(Settings):
        wanted = {"bool": bool, "int": int, "float": float, "str": str, "Path": Path}
        kind = str(field.type).removesuffix(" | None")
        assert isinstance(getattr(settings, field.name), wanted[kind])


def test_the_defaults_are_safe() -> None:
    """No token, so no admin route; nothing staged; empty variables are as good as none."""
    assert Settings.load(environ={}) == Settings()
    assert Settings.load(environ={f"{PREFIX}ADMIN_TOKEN": "", f"{PREFIX}STAGING_BYTES": ""}) == (
        Settings()
    )
    assert Settings().admin_token is None
    assert Settings().staging_bytes is None


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server starts."""
    monkeypatch.setenv("ENGINE_PLUGINS_STAGING_BYTES", "77")
    assert Settings.load().staging_bytes == 77


def test_an_engines_configuration_goes_above_the_environment() -> None:
    """Typed values or strings, both."""
    environ = {"ENGINE_PLUGINS_STALL_TIMEOUT_S": "5", "ENGINE_PLUGINS_MAX_BODY_BYTES": "10"}
    settings = Settings.load({"stall_timeout_s": 7, "staging_bytes": "3"}, environ)
    assert (settings.stall_timeout_s, settings.max_body_bytes) == (7.0, 10)
    assert settings.staging_bytes == 3


def test_a_setting_that_does_not_exist_is_told_with_those_that_do() -> None:
    """A typing error must not pass for a setting."""
    with pytest.raises(SettingsError, match=r"stal_timeout_s.*stall_timeout_s") as error:
        Settings.load({"stal_timeout_s": 5}, {})
    assert error.value.code == "bad_setting"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_body_bytes", "many"),
        ("max_body_bytes", "1.5"),
        ("max_body_bytes", "0"),
        ("max_manifest_bytes", "-1"),
        ("max_manifest_entries", "0"),
        ("stall_timeout_s", "soon"),
        ("stall_timeout_s", "0"),
        ("stall_timeout_s", "-3"),
        ("stall_timeout_s", "nan"),
        ("stall_timeout_s", "inf"),
        ("staging_bytes", "-1"),
        ("max_body_bytes", None),
        ("max_body_bytes", [1]),
        ("staging_bytes", True),
        ("staging_bytes", 1.5),
        ("source_policy", "closest"),
        ("source_policy", None),
        ("expected_link_gbps", "0"),
        ("sleep", "deep"),
        ("memory_saver_hook_mode", "ptrace"),
        ("allow_preload_on_blackwell", "maybe"),
        ("expected_link_gbps", "fast"),
        ("expected_link_gbps", "nan"),
        ("prefill_gate", "on"),
        ("prefill_gate", None),
        ("prefill_cap_bytes", "0"),
        ("prefill_cap_bytes", "-1"),
        ("prefill_cap_bytes", 1.5),
        ("prefill_margin_quantile", "0"),
        ("prefill_margin_quantile", "1.01"),
        ("prefill_margin_quantile", "nan"),
        ("prefill_margin_bytes", "-1"),
        ("admin_token_file", 5),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_the_settings_name(name: str, value: Any) -> None:
    """At the start, not at the first update."""
    with pytest.raises(SettingsError, match=PREFIX + name.upper()):
        Settings.load({name: value}, {})


def test_secrets_do_not_show_where_settings_are_printed() -> None:
    """Settings end up in logs and tracebacks."""
    assert "s3cret" not in repr(Settings(admin_token="s3cret"))


@pytest.mark.parametrize(
    "name",
    ["admin_token", "ADMIN_TOKEN", "admin-token", "Admin_Token", "ENGINE_PLUGINS_ADMIN_TOKEN"],
)
@pytest.mark.parametrize("value", ["s3cret", "", None, 5, ["s3cret"], {"admin_token": "s3cret"}])
def test_a_secret_in_an_engines_configuration_is_refused_and_not_shown(
    name: str, value: Any
) -> None:
    """However it is written: it is on a command line, and in the engine's log."""
    with pytest.raises(SettingsError, match=name) as caught:
        Settings.load({"staging_bytes": 1, name: value}, {"ENGINE_PLUGINS_ADMIN_TOKEN": "t"})
    said = f"{caught.value} {caught.value!r} {caught.value.remedy}"
    assert "ENGINE_PLUGINS_ADMIN_TOKEN or ENGINE_PLUGINS_ADMIN_TOKEN_FILE" in caught.value.remedy
    assert "choose a new one" in caught.value.remedy
    assert "s3cret" not in said


@pytest.mark.parametrize("overrides", ["s3cret", ["s3cret"], 5, {"x": {"admin_token": "s3cret"}}])
def test_what_is_not_settings_by_name_is_refused_and_not_shown(overrides: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load(overrides, {})
    assert "s3cret" not in f"{caught.value!r} {caught.value.remedy}"


def test_every_secret_is_a_setting_that_is_not_shown() -> None:
    """A token of a later release is one too, or this test fails."""
    hidden = {field.name for field in fields(Settings) if not field.repr}
    assert hidden == SECRETS
    named = {field.name for field in fields(Settings) if "token" in field.name}
    assert named - {"admin_token_file"} == SECRETS
