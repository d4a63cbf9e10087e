"""Measurements kept over restarts, for the engine that they were made on and no other."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine_plugins.prefill_gate.fitted_line import Sample
from engine_plugins.prefill_gate.model_memory import Regime

__all__ = ["CalibrationFile", "CalibrationKey"]

logger = logging.getLogger(__name__)

FORMAT = 1


class CalibrationKey(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal for measurements to hold.

    Attributes:
        model: as the engine was asked to load it.
        engine: its name and release.
        tp_size: ranks of the model.
        backend: device and attention backend, and what else changes what a step allocates.
        prior: `ModelMemory.description`, over which samples are told.
    """

    model: str
    engine: str
    tp_size: int
    backend: str
    prior: dict[str, Any]


class _Contents(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    key: CalibrationKey
    samples: dict[Regime, list[Sample]]


class CalibrationFile:
    """The samples of one key, in a file of their own.

    Args:
        folder: where calibrations lie; made when the first is written.
        key: of this engine rank.
        expire_s: after which a sample is not read any more.
    """

    def __init__(self, folder: Path, key: CalibrationKey, *, expire_s: float) -> None:
        name = hashlib.sha256(msgspec.json.encode(key, order="sorted")).hexdigest()[:32]
        self.path = folder / f"{name}.json"
        self._key, self._expire_s = key, expire_s

    def read(self, *, now: float) -> dict[Regime, list[Sample]]:
        """The samples that have not expired; none, with a warning, from a file that is broken.

        Args:
            now: seconds of the epoch.
        """
        try:
            contents = msgspec.json.decode(self.path.read_bytes(), type=_Contents)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            logger.warning("the calibration %s is left aside: %s", self.path, error)
            return {}
        if contents.format != FORMAT or contents.key != self._key:
            logger.warning("the calibration %s is of another engine, and left aside", self.path)
            return {}
        since = now - self._expire_s
        return {
            regime: [sample for sample in samples if _is_sound(sample, since, now)]
            for regime, samples in contents.samples.items()
        }

    def write(self, samples: Mapping[Regime, Sequence[Sample]]) -> None:
        """Replace the file in one piece.

        Raises:
            OSError: the folder cannot be written; the file is as before.
        """
        contents = _Contents(
            format=FORMAT,
            key=self._key,
            samples={name: list(each) for name, each in samples.items()},
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(contents))
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def _is_sound(sample: Sample, since: float, now: float) -> bool:
    return (
        all(map(math.isfinite, sample))
        and sample.expected > 0
        and sample.measured >= 0
        and since <= sample.at <= now
    )
