"""The judge: an answer is right if whole weights explain each token, those that its label names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["Answer", "Span", "Verdict", "judged"]

Verdict = Literal["right", "wrong", "lying"]
Explained = Callable[[int, tuple[int, ...], tuple[int, ...]], tuple[bool, ...]]
"""Of weights, a prompt and an answer: for each token, whether these weights say it."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Tokens from start up to end that the engine says a version made."""

    label: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client got.

    Attributes:
        prompt: token ids.
        tokens: token ids of the answer, as many as came.
        spans: the engine's version field; None where the answer broke off before it.
        broken: why it broke off or never began; empty where it is whole.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    spans: tuple[Span, ...] | None = None
    broken: str = ""


def judged(answer: Answer, weights_of: Mapping[str, int], explained: Explained) -> Verdict:
    """Judge one answer.

    Args:
        answer: of an engine.
        weights_of: the whole weights of every label that was ever sent to the engine.
        explained: see `Explained`.

    Returns:
        `right`; `lying` if whole weights explain it, but not those that the label names; `wrong`
        if none do, as with a mixture.
    """
    if answer.spans is not None and _true(answer, answer.spans, weights_of, explained):
        return "right"
    by_weights = [
        explained(weights, answer.prompt, answer.tokens) for weights in set(weights_of.values())
    ]
    if not all(any(said) for said in zip(*by_weights, strict=True)):
        return "wrong"
    return "right" if answer.spans is None else "lying"


def _true(
    answer: Answer,
    spans: tuple[Span, ...],
    weights_of: Mapping[str, int],
    explained: Explained,
) -> bool:
    """Whether spans cover all tokens, one after the other, and each tells the truth."""
    at = 0
    for span in spans:
        if span.start != at or span.label not in weights_of:
            return False
        said = explained(weights_of[span.label], answer.prompt, answer.tokens)
        if not all(said[span.start : span.end]):
            return False
        at = span.end
    return at == len(answer.tokens)
