"""The committed models that can be served, in two weight versions with expected greedy tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

LIVE = Path(__file__).resolve().parents[1] / "fixtures" / "megatron_live"


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """One version of one model: its folder, its tensors, and what it says."""

    kind: str
    version: int

    @property
    def folder(self) -> Path:
        """The folder of the fixture; not one to serve from, it holds more than a model."""
        return LIVE / "hf" / f"{self.kind}_v{self.version}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by HF name, float32."""
        return load_file(self.folder / "model.safetensors")

    def config(self) -> dict[str, object]:
        """The HF config as a dict."""
        return dict(json.loads((self.folder / "config.json").read_text()))

    def prompts(self) -> list[list[int]]:
        """Prompts with known answers."""
        return [list(prompt) for prompt in self._greedy()["prompts"]]

    def expected(self) -> list[list[int]]:
        """16 greedy ids for each prompt, from HF transformers."""
        return [list(ids) for ids in self._greedy()["ids"]]

    def wrong_answers(
        self, greedy: Callable[[list[int]], list[int]], *, at_once: bool = True
    ) -> list[str]:
        """What an engine says otherwise than HF transformers; empty when it is right.

        It is asked for all at once, unless told not to: a step of several requests costs no more
        than a step of one.
        """
        prompts = self.prompts()
        with ThreadPoolExecutor(len(prompts) if at_once else 1) as pool:
            answers = list(pool.map(greedy, prompts))
        return [
            f"{prompt}: {said} instead of {ids}"
            for prompt, ids, said in zip(prompts, self.expected(), answers, strict=True)
            if said != ids
        ]

    def copy_to(self, folder: Path) -> Path:
        """A folder that an engine can load: the config and the weights alone."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(self.folder / name, folder / name)
        return folder

    def _greedy(self) -> dict[str, list[list[int]]]:
        return dict(json.loads((self.folder / "greedy.json").read_text()))
