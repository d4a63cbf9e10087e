"""Signatures of an engine against how we use them."""

from __future__ import annotations

import pytest

from engine_plugins.signatures import fits_call, fits_hook, signature_written


@pytest.mark.parametrize(
    ("seen", "wanted", "fits"),
    [
        ("(self, a)", "(self, a)", True),
        ("(self, a, b=1)", "(self, a)", True),  # a new one that may be left out
        ("(self, a, *, b=1)", "(self, a)", True),
        ("(self, a, b)", "(self, a)", False),  # a new one that must be given
        ("(self, a, *, b)", "(self, a)", False),
        ("(self)", "(self, a)", False),
        ("(self, b)", "(self, a)", False),  # renamed: it may mean something else
        ("(self, b, a)", "(self, a, b)", False),
        ("(self, *args)", "(self, a)", True),
        ("(self, mode=None, a=1)", "(self, *, a)", True),
        ("(self, **kwargs)", "(self, *, a)", True),
        ("(self, *, a)", "(self, a)", False),
        ("(self, a, /)", "(self, *, a)", False),
        ("(req, is_insert=True)", "(req, *, checkpoint)", False),
        ("(self, method, *args)", "(self, method, *args)", True),
        ("(self, method, args=())", "(self, method, *args)", False),
    ],
)
def test_a_call_fits(seen: str, wanted: str, *, fits: bool) -> None:
    """What we pass is taken, and nothing else is needed."""
    assert fits_call(signature_written(seen), signature_written(wanted)) == fits


@pytest.mark.parametrize(
    ("seen", "wanted", "fits"),
    [
        ("(self, a)", "(self, a)", True),
        ("(self, a, b=1)", "(self, a)", False),  # the engine may pass it, and ours takes it not
        ("(self, a, b=1)", "(self, a, *args, **kwargs)", True),
        ("(self, a, b)", "(self, a, *args, **kwargs)", True),
        ("(self, a, *, b)", "(self, a, *args)", False),
        ("(self, a, /, b, *, c)", "(self, a, **kwargs)", True),
        ("(self, a, b, /)", "(self, a, **kwargs)", False),
        ("(self, b)", "(self, a, *args, **kwargs)", False),
        ("(self)", "(self, a, *args, **kwargs)", False),
        ("(self, a=1)", "(self, a)", False),  # the engine may leave it out
        ("(self, single_pass, batch)", "(self, *, batch, **rest)", True),
        ("(self, single_pass)", "(self, *, batch, **rest)", False),
    ],
)
def test_a_hook_fits(seen: str, wanted: str, *, fits: bool) -> None:
    """Whatever the engine passes to its own function, ours takes or hands on."""
    assert fits_hook(signature_written(seen), signature_written(wanted)) == fits
