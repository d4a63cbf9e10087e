"""What a server's live parameters hold, read over NIXL as its peers would."""

from __future__ import annotations

import os
import secrets

import httpx
import msgspec
import torch

from engine_plugins.admin_answers import EngineOffer
from engine_plugins.weights.contract.manifest import decode_manifest
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.fetched import fetched_from

__all__ = ["held_weights"]


def held_weights(offer: httpx.Response) -> dict[str, torch.Tensor]:
    """Whole HF tensors from all ranks of a server that answered GET /weights/manifest."""
    told = msgspec.json.decode(offer.content, type=EngineOffer)
    manifests = [decode_manifest(each, max_entries=100_000) for each in told.manifests]
    reader = NixlTransport(f"test-peer-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        return fetched_from(manifests, reader)
    finally:
        reader.close()
