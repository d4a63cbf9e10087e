"""LoRA by peft: the adapters train, and the engine serves the model with them merged in.

    python examples/real_trainers/lora.py --model FOLDER --engine URL

The trainer's own model stays unmerged: adapted weights are merged in memory of the sender's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_plugins import WeightSender
from three_steps import SENTENCES, judge, parsed_options, train


def main() -> None:
    options = parsed_options(__doc__)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    adapted = LoraConfig(r=16, lora_alpha=64, target_modules="all-linear")
    model: Any = get_peft_model(base, adapted)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    with WeightSender.from_hf(
        model, engines=options.engine, config=base.config, merge_lora=True
    ) as sender:
        for version, sentence in enumerate(SENTENCES, options.version):
            train(model, tokenizer, optimizer, sentence)
            sender.update(version)
            merged = copy.deepcopy(model).merge_and_unload()
            judge(options.engine, options.model, merged.named_parameters())


if __name__ == "__main__":
    main()
