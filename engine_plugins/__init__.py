"""Drive a stock vLLM or SGLang server from an RL trainer: live weight updates with proof.

This package holds everything that is independent of an engine: source and destination
maps, plans, transports, the admin contract and the trainer's sender. It never imports
vllm, sglang or triton; `vllm_ext` and `sglang_ext` connect it to the engines.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
