"""Megatron's legacy grouped experts, seen as one parameter per expert.

`GroupedMLP` keeps a rank's experts in two flat parameters, untransposed: `weight1` is memory of
[experts, hidden, 2 x ffn] under the shape [hidden, experts x 2 x ffn], and `weight2` memory of
[experts, ffn, hidden] under [experts x ffn, hidden]. Source: megatron-core 0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from engine_plugins.errors import SourceError
from engine_plugins.weights.sources.megatron.names import MegatronNames
from engine_plugins.weights.sources.megatron.rank import MegatronRank

__all__ = ["split_legacy_experts"]

_LEGACY = re.compile(r"(.+\.mlp\.experts)\.weight([12])")


def split_legacy_experts(
    native: str, tensor: torch.Tensor, rank: MegatronRank, names: MegatronNames
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give each expert of a legacy grouped parameter the name and axes of a grouped one.

    Args:
        native: any native name; what is no legacy parameter comes back as it is.
        tensor: the parameter.
        rank: says how many experts it holds.
        names: of the model.

    Returns:
        Native name and a view [2 x ffn, hidden] or [hidden, ffn] of each expert's memory.

    Raises:
        SourceError: a parameter that cannot be viewed so.
    """
    match = _LEGACY.fullmatch(native)
    if match is None:
        yield native, tensor
        return
    count, hidden = len(names.local_experts(rank)), names.hidden
    wanted = hidden if match[2] == "1" else tensor.shape[0] if tensor.ndim == 2 else 0
    shape = (count, hidden, -1) if match[2] == "1" else (count, -1, hidden)
    fits = tensor.ndim == 2 and tensor.shape[0] == wanted and tensor.numel() % (count * hidden) == 0
    if not fits or not tensor.is_contiguous():
        raise SourceError(
            f"{native}: shape {tuple(tensor.shape)} is not that of {count} experts of hidden size "
            f"{hidden} in one contiguous parameter",
            remedy="check ep_size and that the config is this model's",
        )
    for expert, memory in enumerate(tensor.detach().view(shape)):
        yield f"{match[1]}.linear_fc{match[2]}.weight{expert}", memory.t()
