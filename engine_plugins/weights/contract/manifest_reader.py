"""Many manifests of one job, which say much alike, read into little memory.

The ranks of a job name the same tensors, and of those that hold the same kind of shards many
columns are equal to the byte. Each different column is kept once; of tensors that a manifest names
as another one did, the names are not even decoded.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine_plugins.weights.contract.manifest import BoxColumns, SourceManifest, TensorColumns

__all__ = ["ManifestReader"]

_WITH_RAW_TENSORS = msgspec.defstruct(
    SourceManifest.__name__,
    [("tensors", msgspec.Raw)],
    bases=(SourceManifest,),
    frozen=True,
    kw_only=True,
)


class ManifestReader:
    """Reads manifests that `decode_manifest` has let pass, and keeps what is alike once."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(_WITH_RAW_TENSORS)
        self._tensors: dict[bytes, TensorColumns] = {}
        self._names: dict[str, str] = {}
        self._columns: dict[bytes, bytes] = {}

    def read(self, body: bytes) -> SourceManifest:
        """One manifest; equal columns of those read before are the same objects in it.

        Args:
            body: msgpack, as `encode_manifest` gives it.

        Raises:
            msgspec.MsgspecError: it is something else.
        """
        decoded: Any = self._decoder.decode(body)
        fields = msgspec.structs.asdict(decoded)
        raw = bytes(decoded.tensors)
        fields["tensors"] = self._tensors.get(raw) or self._decoded(raw)
        boxes = msgspec.structs.asdict(decoded.boxes)
        once = self._columns.setdefault
        fields["boxes"] = BoxColumns(**{name: once(each, each) for name, each in boxes.items()})
        return SourceManifest(**fields)

    def _decoded(self, raw: bytes) -> TensorColumns:
        """Columns of tensors that are new, of names and numbers that may be known."""
        tensors = msgspec.msgpack.decode(raw, type=TensorColumns)
        name, column = self._names.setdefault, self._columns.setdefault
        self._tensors[raw] = TensorColumns(
            names=[name(each, each) for each in tensors.names],
            dtypes=[name(each, each) for each in tensors.dtypes],
            ndims=column(tensors.ndims, tensors.ndims),
            shapes=column(tensors.shapes, tensors.shapes),
        )
        return self._tensors[raw]
