"""vLLM's model classes, looked at in this process."""

from __future__ import annotations

from vllm.model_executor.models import ModelRegistry

__all__ = ["look_at_class_here"]


def look_at_class_here(architecture: str) -> None:
    """Spare vLLM the process in which it would look at the class: that takes longer than tests."""
    known = ModelRegistry.models.get(architecture)
    if known is not None:
        ModelRegistry.register_model(architecture, known.load_model_cls())
