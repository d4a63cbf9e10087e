"""Manifests that name the same tensors, found by value, so that their names are looked at once."""

from __future__ import annotations

from collections.abc import Sequence

from engine_plugins.weights.contract.manifest import SourceManifest

__all__ = ["by_tensors"]


def by_tensors(manifests: Sequence[SourceManifest]) -> tuple[list[SourceManifest], list[int]]:
    """Tell apart what manifests say of tensors.

    Returns:
        One manifest for each different set of tensors, in order of appearance; and of each manifest
        the number of its set.
    """
    first: list[SourceManifest] = []
    candidates: dict[tuple[int, int, str, bytes], list[int]] = {}
    numbers: list[int] = []
    for manifest in manifests:
        tensors = manifest.tensors
        last = tensors.names[-1] if tensors.names else ""
        # Full lists are compared with few others: those of one length, one end, and equal shapes.
        key = (manifest.axes, len(tensors.names), last, tensors.shapes)
        alike = candidates.setdefault(key, [])
        number = next((one for one in alike if first[one].tensors == tensors), len(first))
        if number == len(first):
            alike.append(number)
            first.append(manifest)
        numbers.append(number)
    return first, numbers
