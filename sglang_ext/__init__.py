"""Connects `engine_plugins` to SGLang; the only package of this project that imports sglang."""
