"""A calibration outlives its process, and nothing else than what it was made on."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from engine_plugins.prefill_gate.calibration_file import CalibrationFile, CalibrationKey
from engine_plugins.prefill_gate.fitted_line import Sample
from tests.support.simulated_steps import a_memory, calibrated

DAY_S = 86_400.0


def _key(**changed: object) -> CalibrationKey:
    key = CalibrationKey(
        model="m",
        engine="vllm 0.32.0",
        tp_size=1,
        backend="cpu",
        prior=a_memory().model.description,
    )
    return msgspec.structs.replace(key, **changed)


def _file(folder: Path, key: CalibrationKey | None = None) -> CalibrationFile:
    return CalibrationFile(folder / "calibration", key or _key(), expire_s=7 * DAY_S)


def test_a_restart_predicts_as_before(tmp_path: Path) -> None:
    """Down to the byte."""
    memory = calibrated(a_memory(), at=DAY_S)
    _file(tmp_path).write(memory.samples)
    again = a_memory()
    again.restore(_file(tmp_path).read(now=2 * DAY_S), now=2 * DAY_S)
    assert again.samples == memory.samples
    memory.restore({}, now=2 * DAY_S)
    assert again.description() == memory.description()


@pytest.mark.parametrize(
    "changed",
    [{"model": "n"}, {"engine": "vllm 0.33.0"}, {"tp_size": 2}, {"backend": "cuda"}, {"prior": {}}],
)
def test_another_engine_reads_nothing_of_it(tmp_path: Path, changed: dict[str, object]) -> None:
    """Each part of the key changes what a step takes."""
    _file(tmp_path).write(calibrated(a_memory()).samples)
    assert _file(tmp_path, _key(**changed)).read(now=1.0) == {}


def test_a_file_of_another_key_under_this_name_is_left_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Copied by hand, say."""
    other = _file(tmp_path, _key(model="n"))
    other.write(calibrated(a_memory()).samples)
    other.path.rename(_file(tmp_path).path)
    with caplog.at_level(logging.WARNING):
        assert _file(tmp_path).read(now=1.0) == {}
    assert "another engine" in caplog.text


def test_samples_expire_one_by_one(tmp_path: Path) -> None:
    """And none is from the future: clocks are set back."""
    samples = [Sample(1e6, 2e6, at) for at in (0.0, 5 * DAY_S, 20 * DAY_S)]
    _file(tmp_path).write({"layers": samples})
    assert _file(tmp_path).read(now=10 * DAY_S) == {"layers": [samples[1]]}


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\xff\xfe",
        b"{}",
        b"[1, 2",
        b'{"format": 1, "key": {}, "samples": {"layers": [[1, 2]]}}',
    ],
)
def test_a_broken_file_is_none_with_a_warning(
    tmp_path: Path, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that was full must not keep an engine from starting."""
    file = _file(tmp_path)
    file.write({})
    file.path.write_bytes(broken)
    with caplog.at_level(logging.WARNING):
        assert file.read(now=1.0) == {}
    assert str(file.path) in caplog.text


def test_samples_that_cannot_be_are_left_out(tmp_path: Path) -> None:
    """A line through them would be nonsense."""
    file = _file(tmp_path)
    good = Sample(1e6, 2e6, 0.5)
    file.write({"layers": [good, Sample(-1.0, 2e6, 0.5), Sample(1e6, -5.0, 0.5)]})
    assert file.read(now=1.0) == {"layers": [good]}


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """And nothing beside it."""
    file = _file(tmp_path)
    file.write({"layers": [Sample(1e6, 2e6, 0.5)]})
    before = file.path.read_bytes()
    unwritable = {"layers": [Sample(1e6, 2e6, object())]}  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        file.write(unwritable)  # type: ignore[arg-type]
    assert file.path.read_bytes() == before
    assert list(file.path.parent.iterdir()) == [file.path]
