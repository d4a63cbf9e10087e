"""A server whose installs a test can hold or fail, see `stepping` and `sglang_launcher`."""

from __future__ import annotations

from typing import Any

import torch.distributed

from sglang_ext import scheduler_extension
from sglang_ext.weight_installer import SglangWeightInstaller
from tests.support.sglang_launcher import launch
from tests.support.stepping import watch_installs


class _SteppingInstaller(SglangWeightInstaller):
    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        watch_installs(self, torch.distributed.get_rank(scheduler.tp_cpu_group))


vars(scheduler_extension)["SglangWeightInstaller"] = _SteppingInstaller

if __name__ == "__main__":
    launch()
