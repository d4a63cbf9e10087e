"""A trainer that gives the weights of every step to a live server of vLLM or SGLang.

It runs against any server that was started with engine-plugins:

    python examples/trainer.py --model FOLDER --engine http://127.0.0.1:8000

and reports each step as a line of JSON. `live_update_demo.py` starts such a server and this.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_plugins.trainer_sender import WeightSender

PROMPT = "What is new? "
ANSWER = "fresh weights, no restart needed!"
"""What the model shall learn to say."""

ITERATIONS_PER_STEP = 2
MAX_NEW_TOKENS = 36
CHECKED_PROMPTS = (PROMPT, "Tell me more", "0, 1, 2, ", "?")


def main() -> None:
    options = parsed_options()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    # Registers the parameters' own memory, once. No copy is made, now or later: engines read
    # from it while update() runs. The admin token comes from ENGINE_PLUGINS_ADMIN_TOKEN.
    with WeightSender.from_hf(model, engines=options.engine) as sender:
        say(ready=True)
        for step in range(1, options.steps + 1):
            before = greedy(options.engine, PROMPT)["text"]
            loss = train(model, tokenizer, optimizer)

            began = time.time()
            report = sender.update(version=step)  # returns once the server has these weights

            (engine,) = report.engines.values()
            say(
                step=step,
                loss=loss,
                version=report.version,
                bytes=report.bytes,
                update_began=began,
                update_s=report.seconds,
                pause_s=engine.paused_s,
                before=before,
                after=greedy(options.engine, PROMPT)["text"],
            )

    for prompt in CHECKED_PROMPTS:
        say(
            prompt=prompt,
            server=greedy(options.engine, prompt)["token_ids"],
            transformers=reference(model, tokenizer, prompt),
        )


def train(model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer) -> float:
    """Some AdamW iterations towards `ANSWER`; returns the last loss."""
    tokens = tokenizer(PROMPT + ANSWER + tokenizer.eos_token, return_tensors="pt").input_ids
    labels = tokens.clone()
    labels[:, : len(tokenizer(PROMPT).input_ids)] = -100  # the prompt is given, not learned
    loss = torch.zeros(())
    for _ in range(ITERATIONS_PER_STEP):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def greedy(engine: str, prompt: str) -> dict[str, Any]:
    """The live server's greedy answer: `text` and `token_ids`."""
    request = {
        "prompt": prompt,
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    response = httpx.post(f"{engine}/v1/completions", json=request, timeout=60, trust_env=False)
    response.raise_for_status()
    return dict(response.json()["choices"][0])


@torch.no_grad()
def reference(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """What Hugging Face transformers generates from the trainer's weights as they are now."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    answer = model.generate(tokens, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return list(answer[0, tokens.shape[1] :].tolist())


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the checkpoint to start from")
    parser.add_argument("--engine", required=True, help="url of the server to update")
    parser.add_argument("--steps", type=int, default=5, help="training steps (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
