"""Drive a stock vLLM or SGLang server from an RL trainer: live weight updates with proof.

This package holds everything that is independent of an engine: source and destination
maps, plans, transports, the admin contract and the trainer's sender. It never imports
vllm, sglang or triton; `vllm_ext` and `sglang_ext` connect it to the engines.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine_plugins.sender.joining import AddedEngines as AddedEngines
    from engine_plugins.sender.report import EnginesFailedError as EnginesFailedError
    from engine_plugins.sender.report import SenderReport as SenderReport
    from engine_plugins.trainer_sender import WeightSender as WeightSender
    from engine_plugins.weights.sources.megatron.rank import MegatronChunk as MegatronChunk
    from engine_plugins.weights.sources.megatron.rank import MegatronRank as MegatronRank
    from engine_plugins.weights.sources.megatron.registry import MegatronRule as MegatronRule
    from engine_plugins.weights.sources.megatron.registry import register_family as register_family
    from engine_plugins.worker_environment import forwarded_environment as forwarded_environment

__version__ = "0.1.0"

_HOMES = {
    "AddedEngines": "engine_plugins.sender.joining",
    "EnginesFailedError": "engine_plugins.sender.report",
    "MegatronChunk": "engine_plugins.weights.sources.megatron.rank",
    "MegatronRank": "engine_plugins.weights.sources.megatron.rank",
    "MegatronRule": "engine_plugins.weights.sources.megatron.registry",
    "SenderReport": "engine_plugins.sender.report",
    "WeightSender": "engine_plugins.trainer_sender",
    "forwarded_environment": "engine_plugins.worker_environment",
    "register_family": "engine_plugins.weights.sources.megatron.registry",
}
"""What a trainer imports; loaded when asked for, since engines import this package too."""

__all__ = [
    "AddedEngines",
    "EnginesFailedError",
    "MegatronChunk",
    "MegatronRank",
    "MegatronRule",
    "SenderReport",
    "WeightSender",
    "__version__",
    "forwarded_environment",
    "register_family",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
