"""A module's tensors under checkpoint names; how FSDP cuts them is `test_dtensor_source`'s."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from engine_plugins.weights.sources.fsdp_source import fsdp_tensors


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("bias_correction", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def test_wrappers_leave_no_trace_in_the_names() -> None:
    """Activation checkpointing inside, torch.compile inside and outside."""
    second = torch.compile(nn.Linear(2, 2))
    assert isinstance(second, nn.Module)
    inner = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), second)
    plain = {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert dict(fsdp_tensors(inner)).keys() == plain != dict(inner.named_parameters()).keys()
    compiled = torch.compile(inner)
    assert isinstance(compiled, nn.Module)
    assert dict(fsdp_tensors(compiled)).keys() == plain


def test_saved_buffers_are_given_and_caches_are_not() -> None:
    """A router's correction bias is part of a checkpoint; rotary caches are not."""
    names = [name for name, _ in fsdp_tensors(nn.Sequential(Router()))]
    assert names == ["0.linear.weight", "0.linear.bias", "0.bias_correction"]


def test_a_tied_parameter_is_given_once() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    assert [name for name, _ in fsdp_tensors(nn.Sequential(first, second))] == ["0.weight"]
