"""Data parallel, compiled: every process holds the whole model, and offers it to the engines.

torchrun --nproc-per-node 2 examples/real_trainers/ddp.py --model FOLDER --engine URL
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_plugins import WeightSender
from three_steps import SENTENCES, judge, parsed_options, train


def main() -> None:
    options = parsed_options(__doc__)
    dist.init_process_group("gloo")
    inner = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    # This backend needs no C++ compiler; the names are those of any other.
    compiled: Any = torch.compile(DistributedDataParallel(inner), backend="aot_eager")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=4e-3)
    with WeightSender.from_hf(compiled, engines=options.engine, config=inner.config) as sender:
        for version, sentence in enumerate(SENTENCES, options.version):
            train(compiled, tokenizer, optimizer, sentence)
            sender.update(version)
            if dist.get_rank() == 0:
                judge(options.engine, options.model, inner.named_parameters())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
