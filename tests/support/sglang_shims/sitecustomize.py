"""Test only: let torchvision, as PyPI has it, be imported next to a CPU build of PyTorch.

PyPI's torchvision is a CUDA build: beside a CPU build of PyTorch its operators do not load,
and with them go the schemas of `torchvision::nms` and `qnms`, for which importing torchvision
registers meta implementations. SGLang and transformers import torchvision. Whoever installs SGLang
normally has builds that match, and needs nothing of this.

Python imports this module at every start of a process that has its folder in PYTHONPATH. It
imports nothing heavy: the schema is declared when torchvision comes to where it needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

NEEDS_SCHEMAS = "torchvision._meta_registrations"
OPERATORS = ("nms", "qnms")
ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_kept: list[object] = []
"""A library of PyTorch takes its schemas along when it is collected."""


class DeclareSchemas:
    """An import hook that finds nothing, and acts when the module that needs it is looked for."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name == NEEDS_SCHEMAS:
            _declare()


def _declare() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _kept.append(library)
    for operator in OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + ARGUMENTS)


sys.meta_path.insert(0, DeclareSchemas)
