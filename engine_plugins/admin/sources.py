"""Manifests that trainers have sent, as files that every process of the server reads.

Everything here takes its time with the disk and the processor, and is called in a thread: a
thousand trainer ranks may publish at once while the server answers others. A source that is gone is
no loss: its trainer is told so when it connects, and publishes again.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from engine_plugins.admin.runtime_files import RuntimeFiles
from engine_plugins.errors import ServerFilesError, UnknownIdError, WeightMismatchError
from engine_plugins.weights.boxes.model_facts import compare_facts
from engine_plugins.weights.contract.manifest import decode_manifest, encode_manifest

__all__ = ["Sources"]

logger = logging.getLogger(__name__)

MAX_SOURCES = 1 << 16
"""Most that one plan is made of: the ranks of one trainer."""
CONNECT_BYTES = MAX_SOURCES * 64
"""What it takes to name them."""
IDLE_S = 3600.0
"""A source that no plan is made of goes when nobody has used it for so long."""
PUBLISHING_S = 600.0
"""For so long none goes: the ranks of a large job publish one after the other, and then connect."""
DISK_SHARE = 4
"""All together take at most one part in so many of what the disk would have free without them."""
LOOK_S = 60.0
"""How often the files are looked at, while there is room."""
_SOURCE_ID = re.compile(r"source-[0-9a-f]{24}")


class _Heading(msgspec.Struct, frozen=True):
    """What connecting looks at; the columns are passed over."""

    source: str
    agent: str
    model: dict[str, str | int | bool]


class Sources:
    """The newest manifests, by an id that is made of their content.

    Args:
        runtime_dir: where they lie.
        max_entries: most rows of a table in one of them.
    """

    def __init__(self, runtime_dir: Path, *, max_entries: int) -> None:
        self._files = RuntimeFiles(runtime_dir, "sources")
        self._made_of = RuntimeFiles(runtime_dir, "plans")
        """For each plan the ids of its sources."""
        self._max_entries = max_entries
        self._held_bytes = 0
        """As of the last look, and what was added since."""
        self._look_at = 0.0

    def add(self, body: bytes, content_type: str) -> str:
        """Check a manifest and hold it; the same manifest has the same id.

        Raises:
            AdminRequestError, ManifestError: see `decode_manifest`.
            ServerFilesError: there is no room for it.
        """
        manifest = decode_manifest(body, content_type=content_type, max_entries=self._max_entries)
        plain = encode_manifest(manifest)
        source_id = "source-" + hashlib.sha256(plain).hexdigest()[:24]
        if not self._files.touch(source_id):
            self._make_room(len(plain))
            self._files.put(source_id, plain)
            self._held_bytes += len(plain)
        return source_id

    def paths(self, source_ids: Sequence[str], facts: Mapping[str, str | int | bool]) -> list[Path]:
        """The manifests' files, each once; they count as used now.

        Raises:
            UnknownIdError: one is not here.
            WeightMismatchError: one is of another model than `facts` say, or two are of one agent.
        """
        decoder = msgspec.msgpack.Decoder(_Heading)
        paths: list[Path] = []
        agents: set[str] = set()
        for source_id in dict.fromkeys(source_ids):
            ours = _SOURCE_ID.fullmatch(source_id)
            kept = self._files.get(source_id) if ours else None
            if kept is None:
                raise UnknownIdError(
                    f"no source {source_id[:80]!r} here", remedy="POST its manifest again"
                )
            self._files.touch(source_id)
            heading = decoder.decode(kept)
            compare_facts(heading.model, facts, who=heading.source)
            if heading.agent in agents:
                raise WeightMismatchError(
                    f"two sources say they are the agent {heading.agent}",
                    remedy="publish one manifest for each trainer process",
                )
            agents.add(heading.agent)
            paths.append(self._files.folder / source_id)
        return paths

    def planned(self, plan_id: str, source_ids: Iterable[str], dropped: Iterable[str]) -> None:
        """Remember what a plan is made of, and forget the sources of those that it displaced.

        Those stay that somebody has used since, or that another plan is made of. Nothing depends
        on this but the room that it saves.
        """
        try:
            self._made_of.put(plan_id, "\n".join(source_ids).encode())
            dropped = set(dropped)
            old = [each for each in self._made_of.listed() if each.name in dropped]
            made_at = {name: plan.used_at for plan in old for name in self._of_plan(plan.name)}
            self._made_of.drop(dropped)
            needed = self._of_all_plans()
            used_at = {each.name: each.used_at for each in self._files.listed()}
            self._files.drop(
                name for name in made_at.keys() - needed if used_at.get(name, 0.0) <= made_at[name]
            )
        except ServerFilesError as error:
            logger.warning("which sources %s is made of could not be kept: %s", plan_id, error)

    def _of_plan(self, plan_id: str) -> list[str]:
        return (self._made_of.get(plan_id) or b"").decode().split()

    def _of_all_plans(self) -> set[str]:
        return {name for plan in self._made_of.listed() for name in self._of_plan(plan.name)}

    def _make_room(self, nbytes: int) -> None:
        """Forget what nobody uses, if there is no room or none has been made for a while.

        Raises:
            ServerFilesError: all that is here is in use, and more than may be.
        """
        now = time.monotonic()
        most = (self._files.free_bytes() + self._held_bytes) // DISK_SHARE
        if now >= self._look_at or self._held_bytes + nbytes > most:
            self._forget_unused(nbytes)
            self._look_at = now + LOOK_S
            most = (self._files.free_bytes() + self._held_bytes) // DISK_SHARE
        if self._held_bytes + nbytes > most:
            raise ServerFilesError(
                f"sources take {self._held_bytes} bytes, and {nbytes} more would be over {most}: "
                f"one part in {DISK_SHARE} of what the disk of {self._files.folder} has for them",
                remedy="free space on that disk, or start the server with TMPDIR on a larger one",
            )

    def _forget_unused(self, nbytes: int) -> None:
        kept, needed, now = self._files.listed(), self._of_all_plans(), time.time()
        self._held_bytes = sum(each.size for each in kept)
        most = (self._files.free_bytes() + self._held_bytes) // DISK_SHARE
        gone: list[str] = []
        for each in kept:
            idle = now - each.used_at
            too_many = self._held_bytes + nbytes > most and idle > PUBLISHING_S
            if too_many or (idle > IDLE_S and each.name not in needed):
                gone.append(each.name)
                self._held_bytes -= each.size
        self._files.drop(gone)
