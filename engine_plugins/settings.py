"""Settings: from the environment, with an engine's own configuration on top.

Every setting is `ENGINE_PLUGINS_<NAME>`; engines may pass a mapping with the lower-case names
(vLLM: `--additional-config '{"engine_plugins": {"stall_timeout_s": 10}}'`), but for secrets.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine_plugins.errors import SettingsError

__all__ = [
    "ENABLE",
    "GATE_MODES",
    "HOOK_MODES",
    "PREFIX",
    "RESIDUAL_POLICIES",
    "SECRETS",
    "SOURCE_POLICIES",
    "Settings",
]

PREFIX = "ENGINE_PLUGINS_"
ENABLE = PREFIX + "ENABLE"
"""Turns us on where an engine has no flag for it, or its arguments come from no command line."""
SECRETS = frozenset({"admin_token"})
"""Settings from the environment only: other users read command lines, and engines log theirs."""

_SWITCH = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
SOURCE_POLICIES = ("balanced", "nearest", "same_rank")
"""How a rank chooses among trainer ranks that hold the same."""
RESIDUAL_POLICIES = ("enforce", "guard", "observe")
"""A memory that is not known fails, is judged by its upper bound, or nothing ever fails."""
HOOK_MODES = ("preload", "torch")
"""How torch_memory_saver gets hold of allocations."""
GATE_MODES = ("off", "observe", "enforce")
"""Prefills are let be, judged and let be, or judged and held to it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a deployment can choose.

    Attributes:
        admin_token: the token that may do everything; `None` if not set.
        admin_token_file: file of `scope token` lines, read again when it changes.
        max_body_bytes: largest control body that a route accepts.
        max_manifest_bytes: largest manifest, as sent and once decompressed.
        max_manifest_entries: boxes in one manifest.
        stall_timeout_s: a pull that moves nothing for so long is given up, and says who stalled.
        staging_bytes: receive buffers, of all ranks together, that `mode: auto` may use to stage a
            whole update while the old weights serve; 0 installs in place, module by module.
            `None` is a quarter of the host memory that is surely free when an update begins.
        direct_landing: whether bytes may land in live parameters, where these were seen to hold
            the loader's layout.
        source_policy: how a rank chooses among sources that hold the same, one of
            `SOURCE_POLICIES`.
        expected_link_gbps: gigabytes per second that the link to a source should give; one that
            gives far less starts with a warning. `None` expects nothing.
        net_devices: what UCX may use (`mlx5_0:1,mlx5_1:1`), or `inherit` for `UCX_NET_DEVICES` as
            it is. `None` chooses the RDMA ports nearest to each rank's GPU.
        sleep: whether the engine is to give its memory back between uses; its memory saver is then
            forced on.
        memory_saver_hook_mode: one of `HOOK_MODES`; `None` chooses by the GPU.
        allow_preload_on_blackwell: takes hook mode preload where it is known to crash.
        sleep_dir: where weights wait during a sleep of level 1 on the CPU platform; by default the
            system's folder for temporary files.
        residual_policy: what becomes of a sleep whose memory is not seen to be free, one of
            `RESIDUAL_POLICIES`.
        max_residual_gpu_mem_gib: GiB of a GPU that a sleeping engine may hold, ranks on one GPU
            together.
        residual_over_baseline_gib: GiB that it may hold over what it held before it loaded weights.
        prefill_gate: what becomes of prefills for which there is no memory, one of `GATE_MODES`.
        prefill_cap_bytes: memory that a rank may come to hold during a prefill. `None` is what it
            holds at the start and what is free then, within the limits of its process and cgroup.
        prefill_margin_quantile: share of prediction errors that the margin covers.
        prefill_margin_bytes: what the margin never falls below.
        prefill_calibration_dir: where measurements of prefills wait for the next start; by default
            `engine_plugins` in the user's cache folder.
    """

    admin_token: str | None = field(default=None, repr=False)
    admin_token_file: Path | None = None
    max_body_bytes: int = 1 << 20
    max_manifest_bytes: int = 256 << 20
    max_manifest_entries: int = 1_000_000
    stall_timeout_s: float = 30.0
    staging_bytes: int | None = None
    direct_landing: bool = True
    source_policy: str = "balanced"
    expected_link_gbps: float | None = None
    net_devices: str | None = None
    sleep: bool = False
    memory_saver_hook_mode: str | None = None
    allow_preload_on_blackwell: bool = False

    sleep_dir: Path | None = None
    residual_policy: str = "guard"
    max_residual_gpu_mem_gib: float = 3.0
    residual_over_baseline_gib: float = 2.0

    prefill_gate: str = "off"
    prefill_cap_bytes: int | None = None
    prefill_margin_quantile: float = 0.99
    prefill_margin_bytes: int = 256 << 20
    prefill_calibration_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_manifest_bytes", "max_manifest_entries"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{PREFIX}{name.upper()} must be positive")
        if not 0 < self.stall_timeout_s < math.inf:
            raise SettingsError(f"{PREFIX}STALL_TIMEOUT_S must be positive seconds")
        if self.staging_bytes is not None and self.staging_bytes < 0:
            raise SettingsError(f"{PREFIX}STAGING_BYTES must not be negative")
        if self.source_policy not in SOURCE_POLICIES:
            raise SettingsError(
                f"{PREFIX}SOURCE_POLICY must be one of {', '.join(SOURCE_POLICIES)}, "
                f"not {self.source_policy!r}"
            )
        if self.expected_link_gbps is not None and not 0 < self.expected_link_gbps < math.inf:
            raise SettingsError(f"{PREFIX}EXPECTED_LINK_GBPS must be positive GB/s")
        if self.residual_policy not in RESIDUAL_POLICIES:
            raise SettingsError(
                f"{PREFIX}RESIDUAL_POLICY must be one of {', '.join(RESIDUAL_POLICIES)}, "
                f"not {self.residual_policy!r}"
            )
        for name in ("max_residual_gpu_mem_gib", "residual_over_baseline_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(f"{PREFIX}{name.upper()} must be GiB, and not negative")
        if self.prefill_gate not in GATE_MODES:
            raise SettingsError(
                f"{PREFIX}PREFILL_GATE must be one of {', '.join(GATE_MODES)}, "
                f"not {self.prefill_gate!r}"
            )
        if self.prefill_cap_bytes is not None and self.prefill_cap_bytes < 1:
            raise SettingsError(f"{PREFIX}PREFILL_CAP_BYTES must be positive, or left out")
        if not 0 < self.prefill_margin_quantile <= 1:
            raise SettingsError(f"{PREFIX}PREFILL_MARGIN_QUANTILE must be over 0 and at most 1")
        if self.prefill_margin_bytes < 0:
            raise SettingsError(f"{PREFIX}PREFILL_MARGIN_BYTES must not be negative")
        if self.memory_saver_hook_mode not in (None, *HOOK_MODES):
            raise SettingsError(
                f"{PREFIX}MEMORY_SAVER_HOOK_MODE must be one of {', '.join(HOOK_MODES)}, "
                f"not {self.memory_saver_hook_mode!r}"
            )

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Read the environment, then the overrides.

        Raises:
            SettingsError: an override that does not exist or is a secret, or a value of the wrong
                kind.
        """
        environ = os.environ if environ is None else environ
        known = {each.name: str(each.type) for each in fields(cls)}
        values: dict[str, Any] = {
            name: environ[PREFIX + name.upper()]
            for name in known
            if environ.get(PREFIX + name.upper())
        }
        for name, value in _by_name(overrides).items():
            if name not in known:
                raise SettingsError(
                    f"engine_plugins has no setting {name!r}; there are: {', '.join(known)}"
                )
            values[name] = value
        return cls(**{name: _read(name, known[name], value) for name, value in values.items()})


def _by_name(overrides: object) -> Mapping[str, Any]:
    """Check an engine's configuration of us, of which no value is shown: one may be a secret."""
    if not isinstance(overrides, Mapping | None):
        raise SettingsError(
            f"the engine's configuration of engine_plugins is a {type(overrides).__name__}, "
            "not settings by their names"
        )
    for name in overrides or {}:
        if str(name).upper().replace("-", "_").removeprefix(PREFIX).lower() in SECRETS:
            raise SettingsError(
                f"{name} is in the engine's configuration, which others can read in the list of "
                "processes and in the engine's log",
                remedy=f"take it out; it is in this server's log by now, so choose a new one, and "
                f"give it by {PREFIX}ADMIN_TOKEN or {PREFIX}ADMIN_TOKEN_FILE",
            )
    return overrides or {}


def _read(name: str, kind: str, value: Any) -> Any:
    if value is None and kind.endswith("None"):
        return None
    text = isinstance(value, str)
    try:
        if kind == "bool" and (type(value) is bool or str(value).lower() in _SWITCH):
            return value if type(value) is bool else _SWITCH[value.lower()]
        if kind.startswith("int") and (text or type(value) is int):
            return int(value)
        if kind.startswith("float") and (text or type(value) in (int, float)):
            return float(value)
        if kind.startswith("Path"):
            return Path(value)
        if kind.startswith("str") and text:
            return value
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{PREFIX}{name.upper()}: {value!r} is not {kind}") from error
    raise SettingsError(f"{PREFIX}{name.upper()}: a {type(value).__name__} is not {kind}")
