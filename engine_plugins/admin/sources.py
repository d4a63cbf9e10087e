"""Manifests that trainers have sent, as files that every process of the server reads.

Everything here takes its time with the disk and the processor, and is called in a thread: a
thousand trainer ranks may publish at once while the server answers others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from engine_plugins.admin.shared_state import SharedState
from engine_plugins.errors import UnknownIdError, WeightMismatchError
from engine_plugins.weights.manifest import decode_manifest, encode_manifest
from engine_plugins.weights.model_facts import compare_facts

__all__ = ["Sources"]

MAX_SOURCES = 4096
_FOLDER = "sources"
_SOURCE_ID = re.compile(r"source-[0-9a-f]{24}")


class _Heading(msgspec.Struct, frozen=True):
    """What connecting looks at; the columns are passed over."""

    source: str
    agent: str
    model: dict[str, str | int | bool]


class Sources:
    """The newest manifests, by an id that is made of their content.

    Args:
        shared: where they lie.
        max_entries: most rows of a table in one of them.
    """

    def __init__(self, shared: SharedState, *, max_entries: int) -> None:
        self._shared = shared
        self._max_entries = max_entries

    def add(self, body: bytes, content_type: str) -> str:
        """Check a manifest and hold it; the same manifest has the same id.

        Raises:
            AdminRequestError, ManifestError: see `decode_manifest`.
        """
        manifest = decode_manifest(body, content_type=content_type, max_entries=self._max_entries)
        plain = encode_manifest(manifest)
        source_id = "source-" + hashlib.sha256(plain).hexdigest()[:24]
        self._shared.put(_FOLDER, source_id, plain)
        for name in self._shared.names(_FOLDER)[:-MAX_SOURCES]:
            self._shared.drop(_FOLDER, name)
        return source_id

    def paths(self, source_ids: Sequence[str], facts: Mapping[str, str | int | bool]) -> list[Path]:
        """The manifests' files, each once.

        Raises:
            UnknownIdError: one is not here.
            WeightMismatchError: one is of another model than `facts` say, or two are of one agent.
        """
        folder = self._shared.runtime_dir / _FOLDER
        decoder = msgspec.msgpack.Decoder(_Heading)
        paths: list[Path] = []
        agents: set[str] = set()
        for source_id in dict.fromkeys(source_ids):
            ours = _SOURCE_ID.fullmatch(source_id)
            kept = self._shared.get(_FOLDER, source_id) if ours else None
            if kept is None:
                raise UnknownIdError(
                    f"no source {source_id[:80]!r} here", remedy="POST its manifest again"
                )
            heading = decoder.decode(kept)
            compare_facts(heading.model, facts, who=heading.source)
            if heading.agent in agents:
                raise WeightMismatchError(
                    f"two sources say they are the agent {heading.agent}",
                    remedy="publish one manifest for each trainer process",
                )
            agents.add(heading.agent)
            paths.append(folder / source_id)
        return paths
