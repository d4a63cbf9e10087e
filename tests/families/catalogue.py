"""The models of `make families`: tiny, random, each of another family of transformers."""

from __future__ import annotations

from tests.families.dense import DENSE
from tests.families.experts import EXPERTS_MODELS
from tests.families.family import LIVE, Case, Family
from tests.families.gemma import GEMMA
from tests.families.hybrid import HYBRID_MODELS
from tests.families.latent import LATENT_MODELS

__all__ = ["FAMILIES", "cases_of", "family_named"]

FAMILIES = (*DENSE, *GEMMA, *EXPERTS_MODELS, *LATENT_MODELS, *HYBRID_MODELS)
"""In the table's order."""


def cases_of(kind: str) -> list[Case]:
    """All cases of an engine, in the table's order."""
    found = []
    for family in FAMILIES:
        if kind in family.engines:
            found.append(Case(family=family))
            if family.bf16:
                found.append(Case(family=family, way="bfloat16"))
            if kind in family.live:
                found.append(Case(family=family, way=LIVE))
    return found


def family_named(name: str) -> Family:
    """The family of a name."""
    return next(family for family in FAMILIES if family.name == name)
