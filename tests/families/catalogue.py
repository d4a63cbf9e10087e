"""The models of `make families`: tiny, random, each of another family of transformers."""

from __future__ import annotations

from tests.families.dense import DENSE
from tests.families.experts import EXPERTS_MODELS
from tests.families.family import AFTER_ZEROS, BF16, FLOAT32, LIVE, WAYS, Case, Family
from tests.families.gemma import GEMMA
from tests.families.hybrid import HYBRID_MODELS
from tests.families.latent import LATENT_MODELS

__all__ = ["FAMILIES", "cases_of", "family_named"]

FAMILIES = (*DENSE, *GEMMA, *EXPERTS_MODELS, *LATENT_MODELS, *HYBRID_MODELS)
"""In the table's order."""


def cases_of(kind: str) -> list[Case]:
    """All cases of an engine, in the table's order."""
    here = [family for family in FAMILIES if kind in family.engines]
    return [
        Case(family=family, way=way) for family in here for way in WAYS if _has(family, way, kind)
    ]


def _has(family: Family, way: str, kind: str) -> bool:
    """Whether a family is judged so; after zeros those are whose experts engines pack."""
    chosen = {
        FLOAT32: True,
        BF16: family.bf16,
        AFTER_ZEROS: "MoE" in family.kind,
        LIVE: kind in family.live,
    }
    return chosen[way]


def family_named(name: str) -> Family:
    """The family of a name."""
    return next(family for family in FAMILIES if family.name == name)
