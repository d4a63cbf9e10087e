"""Connects `engine_plugins` to vLLM; the only package of this project that imports vllm."""
