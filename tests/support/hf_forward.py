"""A Hugging Face model as the forward pass of an engine: KV position by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

__all__ = ["HfForward"]


class HfForward:
    """The model of a folder in float32; its weights are NaN until some are loaded.

    Args:
        folder: where its config is.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        self.config = config
        self._model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in self._model.parameters():
            parameter.data.fill_(float("nan"))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take every tensor of a checkpoint."""
        parameters = dict(self._model.named_parameters())
        for name, tensor in _as_held(tensors).items():
            parameters.pop(name).copy_(tensor)
        assert not parameters, f"not in the checkpoint: {sorted(parameters)}"

    @torch.no_grad()
    def __call__(
        self, tokens: Sequence[int], kv: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], int]:
        """KV of the tokens that have none yet, and the token that comes next."""
        from transformers import DynamicCache

        known = min(len(kv), len(tokens) - 1)
        cache = DynamicCache(config=self.config)
        if known:
            for layer, (keys, values) in enumerate(torch.stack(list(kv[:known]), dim=-2)):
                cache.update(keys[None], values[None], layer)
        out = self._model(
            torch.tensor([list(tokens[known:])]), past_key_values=cache, use_cache=True
        )
        added = [
            torch.stack([layer.keys[0, :, len(kv) :], layer.values[0, :, len(kv) :]])
            for layer in cache.layers
        ]
        # [layers, 2, heads, positions, head_dim]
        return list(torch.stack(added).unbind(-2)), int(out.logits[0, -1].argmax())


def _as_held(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint names to those in memory, where a layer's experts are stacked."""
    held: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, found, rest = name.partition(".experts.")
        if found:
            number, part, _ = rest.split(".")
            experts.setdefault(layer, {})[part, int(number)] = tensor
        else:
            held[name] = tensor
    for layer, parts in experts.items():
        count = 1 + max(number for _, number in parts)
        gate, up, down = (
            torch.stack([parts[part, number] for number in range(count)])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        held[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        held[f"{layer}.experts.down_proj"] = down
    return held
