"""One rank's share of a Hugging Face checkpoint, grouped and cut as engines do it.

Query, key and value fill one module, gate and up another, all experts of a layer a third; rows or
columns are cut over the ranks. The layout follows from the checkpoint's names and shapes, so any
model of the usual names fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

__all__ = ["ShardedModel", "gathered"]

_MODULES = (
    (re.compile(r"\.([qkv]_proj)\.(\w+)$"), r".qkv_proj.\1_\2"),
    (re.compile(r"\.experts\.(\d+)\.(\w+)\.(\w+)$"), r".experts.\1_\2_\3"),
    (re.compile(r"\.(gate_proj|up_proj)\.(\w+)$"), r".gate_up_proj.\1_\2"),
)
"""Ends of HF names, and the parameters that hold them; all others keep their names."""
_COLUMN_PARALLEL = re.compile(r"(embed_tokens|lm_head|[qkv]_proj|gate_proj|up_proj)\.\w+$")
_ROW_PARALLEL = re.compile(r"(o_proj|down_proj)\.weight(_scale_inv)?$")


class ShardedModel:
    """One rank's parameters, NaN until something is loaded, and the loader that fills them.

    Args:
        shapes: the checkpoint's tensors.
        tied: whether the output head is the embedding.
        tp_rank: this rank.
        tp_size: how many there are.
        dtypes: of the parameters that are not float32, by HF name.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        *,
        tied: bool,
        tp_rank: int,
        tp_size: int,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.tied = tied
        self._shapes, self._tp_rank, self._tp_size = shapes, tp_rank, tp_size
        self._dtypes = dict(dtypes or {})
        self._shards = {
            name: torch.full(
                self._shard_shape(name, shape),
                float("nan"),
                dtype=self._dtypes.get(name, torch.float32),
            )
            for name, shape in shapes.items()
        }

    def twin(self) -> ShardedModel:
        """A model of the same layout."""
        return ShardedModel(
            self._shapes,
            tied=self.tied,
            tp_rank=self._tp_rank,
            tp_size=self._tp_size,
            dtypes=self._dtypes,
        )

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters of this rank, by module."""
        for name, shard in self._shards.items():
            yield _parameter(name), shard

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The engine's own loader: takes whole tensors, skips names that it does not know."""
        for name, weight in weights:
            if name in self._shapes:
                assert weight.shape == self._shapes[name], f"not {tuple(self._shapes[name])}"
                self._shards[name].copy_(self._own(name, weight))

    def shard(self, name: str) -> torch.Tensor:
        """This rank's part of a tensor."""
        return self._shards[name]

    def _own(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        dim = _cut_axis(name)
        return weight if dim is None else weight.chunk(self._tp_size, dim)[self._tp_rank]

    def _shard_shape(self, name: str, shape: torch.Size) -> torch.Size:
        return self._own(name, torch.empty(shape, device="meta")).shape


def gathered(ranks: Sequence[ShardedModel], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' parts."""
    whole = {}
    for name in names:
        dim = _cut_axis(name)
        parts = [rank.shard(name) for rank in ranks]
        whole[name] = parts[0].clone() if dim is None else torch.cat(parts, dim)
    return whole


def _parameter(name: str) -> str:
    for pattern, parameter in _MODULES:
        found, count = pattern.subn(parameter, name)
        if count:
            return found
    return name


def _cut_axis(name: str) -> int | None:
    """The axis along which the ranks share a tensor; None where each has all of it."""
    if _COLUMN_PARALLEL.search(name):
        return 0
    return 1 if _ROW_PARALLEL.search(name) else None
