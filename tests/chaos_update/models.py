"""Whole versions made on the spot, and what transformers says of each.

The models are of one shape and of random weights, so that one token tells them apart, and a mixture
of two says what neither does. They are large enough for a pull to last.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["LONG", "PROMPTS", "SHORT", "VARIANTS", "Models", "Oracle"]

VARIANTS = 4
"""Weights take turns: version n has those of n modulo this."""
_VOCAB = 4096
SHORT = tuple(tuple((37 * n + 11 * at * at + 5) % 4000 + 2 for at in range(6)) for n in range(4))
LONG = tuple(tuple((53 * n + 7 * at * at + 3) % 4000 + 2 for at in range(70)) for n in range(2))
PROMPTS = (*SHORT, *LONG)
_NEAR = {torch.float32: 2e-3, torch.bfloat16: 0.25}
"""Logits this near to the greatest one count as equal: kernels differ by that much. A wrong token
is among those by chance about once in a thousand times."""


class Models:
    """The folders of all weights.

    Args:
        folder: an empty folder to write them to.
        layers: of each; one of them is 15 MB.
    """

    def __init__(self, folder: Path, *, layers: int = 6) -> None:
        self._folder = folder
        for variant in range(VARIANTS):
            _config(layers).save_pretrained(self.folder(variant))
            shapes = {name: parameter.shape for name, parameter in _empty(layers).items()}
            save_file(_weights(shapes, variant), self.file(variant), metadata={"format": "pt"})

    def folder(self, variant: int) -> Path:
        """A folder that an engine can load."""
        return self._folder / f"w{variant}"

    def file(self, variant: int) -> Path:
        """Its tensors, float32."""
        return self.folder(variant) / "model.safetensors"


def _config(layers: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=_VOCAB,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )


def _empty(layers: int) -> dict[str, torch.Tensor]:
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        return dict(Qwen3ForCausalLM(_config(layers)).named_parameters())


def _weights(shapes: dict[str, torch.Size], variant: int) -> dict[str, torch.Tensor]:
    """Random weights under which activations neither die nor blow up."""
    chance = torch.Generator().manual_seed(1000 + variant)

    def one(shape: torch.Size) -> torch.Tensor:
        drawn = torch.randn(shape, generator=chance)
        return 1 + 0.1 * drawn if drawn.ndim == 1 else drawn / shape[-1] ** 0.5

    return {name: one(shape) for name, shape in shapes.items()}


class Oracle:
    """Which tokens transformers explains by whole weights, rounded as the engine has them.

    An engine that recomputes the KV of held requests continues as the new weights would from the
    text so far; so every token is judged by what comes before it, whoever wrote that.
    """

    def __init__(self, models: Models, dtype: torch.dtype) -> None:
        self._models, self._dtype = models, dtype
        self.explained = lru_cache(maxsize=4096)(self._explained)

    def _explained(
        self, variant: int, prompt: tuple[int, ...], tokens: tuple[int, ...]
    ) -> tuple[bool, ...]:
        """For each token, whether it is the greedy one of these weights after all before it."""
        if not tokens:
            return ()
        logits = self._logits(variant, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        said = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return tuple((said >= logits.amax(1) - _NEAR[self._dtype]).tolist())

    @torch.no_grad()
    def _logits(self, variant: int, ids: Sequence[int]) -> torch.Tensor:
        torch.set_num_threads(1)
        return self._loaded[variant](torch.tensor([list(ids)])).logits[0].float()

    @cached_property
    def _loaded(self) -> list[Any]:
        from transformers import AutoModelForCausalLM

        return [
            AutoModelForCausalLM.from_pretrained(
                self._models.folder(variant), dtype=self._dtype, attn_implementation="eager"
            )
            .float()
            .eval()
            for variant in range(VARIANTS)
        ]


def tensors_of(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a version, in a dtype."""
    return {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
