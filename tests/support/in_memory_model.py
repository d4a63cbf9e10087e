"""A small engine-side model with the habits of real ones, and an installer over it.

Fused and sharded parameters, one that is stored transposed, a padded vocabulary, and a loader
that speaks checkpoint names and asserts shapes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self

import torch
from torch import nn

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.coverage import left_out_by_design
from engine_plugins.weights.loader.loader_trace import LoaderTrace, trace_loader

__all__ = [
    "InMemoryInstaller",
    "InMemoryModel",
    "LoadableModel",
    "hf_tensors",
    "needed_bytes",
    "pack_norms",
    "traced",
]

VOCAB, PADDED_VOCAB = 50, 64
QKV = {"q": 2, "k": 1, "v": 1}
"""Rows of each part of a fused qkv, in halves of the hidden size."""


def hf_tensors(*, seed: int, layers: int = 2, hidden: int = 16) -> dict[str, torch.Tensor]:
    """A checkpoint of the model, different for every seed."""
    random = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    tensors = {"model.embed.weight": made(VOCAB, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for part, halves in QKV.items():
            tensors[f"{prefix}.{part}_proj.weight"] = made(halves * hidden // 2, hidden)
        tensors[f"{prefix}.o_proj.weight"] = made(hidden, hidden)
    tensors["model.norm.weight"] = made(hidden)
    return tensors


def needed_bytes(tensors: dict[str, torch.Tensor], tp_size: int) -> int:
    """What all ranks together read: projections once, since they share them, the rest each."""
    return sum(data.nbytes * (1 if "_proj" in name else tp_size) for name, data in tensors.items())


class LoadableModel(Protocol):
    """One rank's share of a model, with a loader that speaks checkpoint names."""

    tied: bool

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...
    def twin(self) -> Self: ...


class _Layer(nn.Module):
    """Parameters of one attention layer, as one rank holds them."""

    def __init__(self, hidden: int, tp_size: int) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(hidden, 2 * hidden // tp_size, bias=False)
        # Stored [in, out]: half of the engines' kernels want it so.
        self.attn.out = nn.Module()
        self.attn.out.weight = nn.Parameter(torch.empty(hidden // tp_size, hidden))


class InMemoryModel(nn.Module):
    """One rank's share of the model. Its weights are NaN until something is loaded."""

    tied = False

    def __init__(
        self, *, layers: int = 2, hidden: int = 16, tp_rank: int = 0, tp_size: int = 1
    ) -> None:
        super().__init__()
        self.layout = {"layers": layers, "hidden": hidden, "tp_rank": tp_rank, "tp_size": tp_size}
        self.embed = nn.Module()
        self.embed.weight = nn.Parameter(torch.empty(PADDED_VOCAB, hidden))
        self.layers = nn.ModuleList(_Layer(hidden, tp_size) for _ in range(layers))
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.empty(hidden))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(float("nan"))

    @classmethod
    def loaded(
        cls, tensors: dict[str, torch.Tensor], *, tp_rank: int = 0, tp_size: int = 1
    ) -> InMemoryModel:
        """A model that was started with these weights."""
        hidden = tensors["model.norm.weight"].numel()
        layers = sum(name.endswith("o_proj.weight") for name in tensors)
        model = cls(layers=layers, hidden=hidden, tp_rank=tp_rank, tp_size=tp_size)
        model.load_weights(tensors.items())
        return model

    def twin(self) -> InMemoryModel:
        """A model of the same layout."""
        return InMemoryModel(**self.layout)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The engine's own loader."""
        with torch.no_grad():
            for name, weight in weights:
                self._load(name, weight)

    def _load(self, name: str, weight: torch.Tensor) -> None:
        words = name.split(".")
        if words[:2] == ["model", "embed"]:
            assert weight.shape[0] == VOCAB
            embed = self.get_parameter("embed.weight").data
            embed[:VOCAB].copy_(weight)
            embed[VOCAB:].fill_(0)
        elif words[:2] == ["model", "norm"]:
            norm = self.get_parameter("norm.weight").data
            assert weight.shape == norm.shape
            norm.copy_(weight)
        elif words[:2] == ["model", "layers"]:
            self._load_layer(f"layers.{words[2]}.attn", words[3].removesuffix("_proj"), weight)

    def _load_layer(self, attn: str, part: str, weight: torch.Tensor) -> None:
        hidden, tp_rank, tp_size = (self.layout[name] for name in ("hidden", "tp_rank", "tp_size"))
        width = hidden // tp_size
        if part == "o":
            assert weight.shape == (hidden, hidden)
            out = self.get_parameter(f"{attn}.out.weight").data
            out.copy_(weight.narrow(1, tp_rank * width, width).t())
            return
        first = sum(QKV[other] for other in "qkv"[: "qkv".index(part)]) * width // 2
        rows = QKV[part] * width // 2
        assert weight.shape[0] == rows * tp_size
        qkv = self.get_parameter(f"{attn}.qkv.weight").data
        qkv.narrow(0, first, rows).copy_(weight.narrow(0, tp_rank * rows, rows))

    def fingerprint(self) -> str:
        """A digest of every byte of the weights."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        return digest.hexdigest()[:16]

    def equals(self, other: InMemoryModel) -> bool:
        """Equality of every parameter, padding included."""
        return self.fingerprint() == other.fingerprint()


def traced(model: LoadableModel, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
    """Trace the loader on a twin of the model that has no memory."""
    with torch.device("meta"):
        twin = model.twin()
    return trace_loader(dict(twin.named_parameters()), twin.load_weights, tensors)


def pack_norms(model: LoadableModel) -> None:
    """Have a model serve from other values of the same shape than its loader copied."""
    load = model.load_weights

    def packing(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        load(weights)
        dict(model.named_parameters())["norm.weight"].data.neg_()

    model.load_weights = packing  # type: ignore[method-assign]


class InMemoryInstaller:
    """The `WeightInstaller` of one in-memory rank; strict about the order of its calls.

    Args:
        model: the live model.

    Attributes:
        install_s: how long each install takes, before it looks at the tensors.
        loading: whether the model holds half-new weights.
        landings: modules whose live parameters were written without an install, this time.
        failures: method name -> how many more of its calls succeed before one fails.
    """

    def __init__(self, model: LoadableModel) -> None:
        self.model = model
        self.install_s = 0.0
        self.loading = False
        self.failures: dict[str, int] = {}
        self.installed: list[str] = []
        self.landings: list[str] = []

    @property
    def model_dtype(self) -> torch.dtype:
        return torch.float32

    def may_go_unused(self, name: str) -> bool:
        return left_out_by_design(name, tied=self.model.tied)

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        self._maybe_fail("trace")
        return traced(self.model, tensors)

    def live_parameters(self) -> dict[str, torch.Tensor]:
        assert not self.loading, "asked in the middle of a load"
        return dict(self.model.named_parameters())

    def begin(self) -> None:
        assert not self.loading, "begun twice"
        self._maybe_fail("begin")
        self.loading = True
        self.installed, self.landings = [], []

    def install(self, modules: Sequence[str], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        assert self.loading, "installed before begin"
        self._maybe_fail("install")
        time.sleep(self.install_s)
        self.model.load_weights(tensors)
        self.installed += modules

    def landed(self, modules: Sequence[str]) -> None:
        assert self.loading, "landed before begin"
        self._maybe_fail("landed")
        self.landings += modules
        self.installed += modules

    def finish(self) -> None:
        assert self.loading, "finished before begin"
        self._maybe_fail("finish")
        everything = {name.rpartition(".")[0] for name, _ in self.model.named_parameters()}
        assert set(self.installed) == everything, "finished half way"
        self.loading = False

    def abandon(self) -> None:
        self._maybe_fail("abandon")
        self.loading = False

    def _maybe_fail(self, method: str) -> None:
        left = self.failures.get(method)
        if left is None:
            return
        self.failures[method] = left - 1
        if left == 0:
            del self.failures[method]
            raise RuntimeError(f"this engine was told to fail in {method}")
