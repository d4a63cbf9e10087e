"""Fixture folders of native Megatron shards beside the HF tensors that they hold.

A folder has `cases/<case>/manifest.json` with `rankRR.vpV.safetensors`, and `hf/<dir>/`
with config.json and the HF tensors; `index.json` lists the cases. Files and keys that
are not known here are left alone. Shards are stored narrower where that loses nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine_plugins.weights.sources.megatron.source import MegatronChunk, MegatronRank

__all__ = [
    "FIXTURES_VARIABLE",
    "MegatronCase",
    "fixture_folders",
    "landing_folders",
    "listed_cases",
    "megatron_cases",
    "read_safetensors",
]

FIXTURES_VARIABLE = "MEGATRON_FIXTURES"
_AXES = ("tp", "pp", "ep", "etp")
_COMMITTED = Path(__file__).parents[1] / "fixtures"


def fixture_folders() -> list[Path]:
    """The folder that the environment names, or the subsets committed here."""
    named = os.environ.get(FIXTURES_VARIABLE)
    if named:
        return [Path(named)]
    return [*_landing(), _COMMITTED / "megatron_families"]


def landing_folders() -> list[Path]:
    """Those of them whose models are large enough for engines to build.

    `megatron_families` is not: a model of each family there is 30 to 50 KB, and no kernel of an
    engine's takes matrices so small.
    """
    named = os.environ.get(FIXTURES_VARIABLE)
    return [Path(named)] if named else _landing()


def _landing() -> list[Path]:
    return [_COMMITTED / "megatron", _COMMITTED / "megatron_live"]


def megatron_cases(folder: Path) -> list[MegatronCase]:
    """Every case found in a folder, by name; empty if there is none."""
    return [MegatronCase(path.parent) for path in sorted(folder.glob("cases/*/manifest.json"))]


def listed_cases(folder: Path) -> set[str]:
    """Names that the folder's index lists; empty without an index."""
    index = folder / "index.json"
    if not index.is_file():
        return set()
    entries = json.loads(index.read_text())
    return {entry["case"] for entry in entries if isinstance(entry, dict) and "case" in entry}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file."""
    with safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class MegatronCase:
    """One case: the ranks of one Megatron job and the HF model that they hold."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest

    @cached_property
    def hf_folder(self) -> Path:
        """Folder of the HF model: `manifest.hf_dir`, from the case or from the fixtures."""
        beside = self.folder / self.manifest["hf_dir"]
        return beside if beside.is_dir() else self.folder.parents[1] / self.manifest["hf_dir"]

    @cached_property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.hf_folder / "config.json").read_text())
        return config

    def expected(self) -> dict[str, torch.Tensor]:
        """HF tensors that the shards hold together."""
        files = sorted(self.hf_folder.glob("model*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{self.hf_folder} holds no model*.safetensors")
        return {name: tensor for path in files for name, tensor in read_safetensors(path).items()}

    def ranks(self) -> Iterator[MegatronRank]:
        """Every rank with its native tensors in the dtypes that the trainer has."""
        ranks = self.manifest["ranks"]
        # Sizes are counted: some manifests' `parallel.etp` contradicts their ranks' places.
        sizes = {axis: 1 + max(rank.get(axis, 0) for rank in ranks) for axis in _AXES}
        for rank in ranks:
            places = {f"{axis}_rank": rank.get(axis, 0) for axis in _AXES}
            places |= {f"{axis}_size": size for axis, size in sizes.items()}
            yield MegatronRank(
                chunks=[self._chunk(rank, entry) for entry in rank["files"]], **places
            )

    def _chunk(self, rank: dict[str, Any], entry: dict[str, Any]) -> MegatronChunk:
        facts = rank.get("params", {}).get(str(entry["vp"]), {})
        return MegatronChunk(
            tensors={
                name: tensor.to(getattr(torch, facts.get(name, {}).get("dtype", "float32")))
                if "stored" in facts.get(name, {})
                else tensor
                for name, tensor in read_safetensors(self.folder / entry["file"]).items()
            },
            global_layers=entry["global_layers"],
            classes={name: fact["module"] for name, fact in facts.items() if fact.get("module")},
        )
