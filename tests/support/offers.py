"""Offering weights to a server step by step, for tests that look between the steps."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from engine_plugins.weights.contract.manifest import SourceManifest, encode_manifest
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.nixl import NixlTransport

MSGPACK = {"content-type": "application/msgpack"}


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Weights of this process, registered with NIXL."""

    admin: httpx.Client
    source: WeightSource

    def publish(self, manifest: SourceManifest | None = None) -> httpx.Response:
        """POST the manifest, or another in its place."""
        body = encode_manifest(manifest or self.source.manifest)
        return self.admin.post("/weights/sources", content=body, headers=MSGPACK)

    def connect(self, manifest: SourceManifest | None = None, **more: Any) -> httpx.Response:
        """Publish and connect; the first answer that is an error, or connect's."""
        published = self.publish(manifest)
        if published.is_error:
            return published
        ids = [published.json()["source_id"]]
        return self.admin.post("/weights/connect", json={"source_ids": ids, **more})

    def update(self, version: int, **more: Any) -> httpx.Response:
        """Connect and update."""
        connected = self.connect()
        if connected.is_error:
            return connected
        return self.update_from(connected.json()["plan_id"], version, **more)

    def update_from(self, plan_id: str, version: int, **more: Any) -> httpx.Response:
        """Update from a plan."""
        body = {"plan_id": plan_id, "version": version, **more}
        return self.admin.post("/weights/update", json=body)


@contextmanager
def offered(admin: httpx.Client, tensors: Mapping[str, torch.Tensor]) -> Iterator[Offer]:
    """Register HF tensors of this process for as long as the context lasts."""
    transport = NixlTransport(f"test-trainer-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with WeightSource(hf_boxes(tensors), transport, source="the test's trainer") as source:
            yield Offer(admin=admin, source=source)
    finally:
        transport.close()
