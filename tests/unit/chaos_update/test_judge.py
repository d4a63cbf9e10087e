"""The judge of `make chaos-update` finds what it is there for."""

from __future__ import annotations

import pytest

from tests.chaos_update.judge import Answer, Span, Verdict, judged

WEIGHTS_OF = {"default": 0, "1": 1, "2": 2}
SAID = {0: (10, 11, 12, 13), 1: (20, 21, 22, 23), 2: (30, 31, 32, 33)}
"""What whole weights say, whatever came before."""


def explained(weights: int, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[bool, ...]:
    """What transformers would find."""
    return tuple(SAID[weights][at] == token for at, token in enumerate(tokens))


def verdict(tokens: tuple[int, ...], *spans: tuple[str, int, int], broken: str = "") -> Verdict:
    answer = Answer(
        prompt=(1,),
        tokens=tokens,
        spans=tuple(Span(label=label, start=start, end=end) for label, start, end in spans) or None,
        broken=broken,
    )
    return judged(answer, WEIGHTS_OF, explained)


def test_whole_versions_under_their_labels_are_right() -> None:
    """One version, or one after the other at a token boundary."""
    assert verdict((10, 11, 12, 13), ("default", 0, 4)) == "right"
    assert verdict((10, 11, 22, 23), ("default", 0, 2), ("1", 2, 4)) == "right"


def test_a_token_that_no_version_says_is_wrong() -> None:
    """As of a mixture of two versions; at any place of the answer, label or not."""
    for at in range(4):
        tokens = (*SAID[1][:at], 99, *SAID[1][at + 1 :])
        assert verdict(tokens, ("1", 0, 4)) == "wrong"
        assert verdict(tokens, broken="reset") == "wrong"


@pytest.mark.parametrize(
    ("tokens", "spans"),
    [
        (SAID[1], [("2", 0, 4)]),
        (SAID[1], [("default", 0, 4)]),
        (SAID[1], [("7", 0, 4)]),
        ((10, 11, 22, 23), [("default", 0, 3), ("1", 3, 4)]),
        ((10, 11, 22, 23), [("1", 0, 4)]),
        (SAID[1], [("1", 0, 3)]),
        (SAID[1], [("1", 1, 4)]),
        (SAID[1], [("1", 0, 2), ("1", 3, 4)]),
    ],
    ids=[
        *("another version", "the version before", "a version that nobody sent"),
        *("a change told too late", "a change not told"),
        *("a last token without a label", "a first one", "a gap"),
    ],
)
def test_a_label_that_is_not_that_of_the_tokens_lies(
    tokens: tuple[int, ...], spans: list[tuple[str, int, int]]
) -> None:
    """The tokens are of whole versions, and the engine's own field says otherwise."""
    assert verdict(tokens, *spans) == "lying"


def test_an_answer_that_broke_off_is_judged_as_far_as_it_came() -> None:
    """It has no label yet."""
    assert verdict(SAID[2][:3], broken="reset") == "right"
    assert verdict((), broken="503") == "right"
