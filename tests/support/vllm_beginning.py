"""What a process of vLLM begins with in the tests: the imports of a server, and two things more.

Its model classes have been looked at: vLLM would do that in a process of its own, which imports
vLLM again. And its processes wait for each other without spinning: for a second after each message
a reader of its shared memory only yields, and on two cores that is the core of whom it waits for.
"""

from __future__ import annotations

import importlib

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

from tests.support.vllm_classes import look_at_class_here

SPINS_S = 0.001
ARCHITECTURES = (
    "Eagle3LlamaForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeMTPModel",
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
IMPORTED = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)

for _module in IMPORTED:
    importlib.import_module(_module)
for _architecture in ARCHITECTURES:
    look_at_class_here(_architecture)
vars(SpinCondition)["__init__"].__defaults__ = (SPINS_S,)
