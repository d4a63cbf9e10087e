"""What the trainers of this folder share: what they learn, and how what is served is judged."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

import httpx
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = ["SENTENCES", "judge", "parsed_options", "train"]

PROMPT = "What is new? "
SENTENCES = ("fresh weights, no restart!", "other weights, same server.", "and so on, step by step")
"""What the model learns to answer, step by step: an engine with older weights says another."""
ITERATIONS_PER_STEP = 40
MAX_NEW_TOKENS = 28


def parsed_options(about: str) -> argparse.Namespace:
    """The options of a trainer: the checkpoint, the engines, the first version."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the checkpoint to start from")
    parser.add_argument("--engine", required=True, help="url of the server to update")
    parser.add_argument("--version", type=int, default=1, help="of the first of three updates")
    parser.add_argument("--mesh", default="2", help="2, or 2x2 for two replicas of two shards")
    parser.add_argument("--offload", action="store_true", help="keep parameters on the CPU")
    return parser.parse_args()


def train(
    model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, sentence: str
) -> torch.Tensor:
    """Some iterations towards one sentence; the last loss."""
    tokens = tokenizer(PROMPT + sentence + tokenizer.eos_token, return_tensors="pt").input_ids
    labels = tokens.clone()
    labels[:, : len(tokenizer(PROMPT).input_ids)] = -100  # the prompt is given, not learned
    loss = torch.zeros(())
    for _ in range(ITERATIONS_PER_STEP):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def judge(engine: str, folder: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Print what the engine answers beside what transformers answers with the same weights.

    Args:
        engine: url of the server, which holds these weights in bfloat16.
        folder: the checkpoint that the trainer began with.
        weights: whole tensors under the names of transformers' model.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # of any release
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    _overwrite(model, dict(weights))
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    answer = model.generate(tokens, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    expected = answer[0, tokens.shape[1] :].tolist()
    served = _served(engine)
    said = {"text": served["text"], "served": served["token_ids"], "transformers": expected}
    print(json.dumps(said), flush=True)


@torch.no_grad()
def _overwrite(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def _served(engine: str) -> dict[str, Any]:
    asked = {"prompt": PROMPT, "max_tokens": MAX_NEW_TOKENS, "temperature": 0}
    response = httpx.post(
        f"{engine}/v1/completions",
        json={**asked, "return_token_ids": True},
        timeout=60,
        trust_env=False,
    )
    response.raise_for_status()
    return dict(response.json()["choices"][0])
