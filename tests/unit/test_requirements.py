"""The pins of each engine environment, and the stamp that says when they are installed."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_setup_env(checkout: Path) -> ModuleType:
    """Import the set-up script of a checkout, which takes its own place as the root."""
    spec = importlib.util.spec_from_file_location("setup_env", checkout / "scripts/setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["setup_env"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy what the set-up script reads."""
    for folder in ["requirements", "scripts"]:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def test_every_environment_pins_one_nixl_package_and_pytest() -> None:
    setup_env = load_setup_env(ROOT)
    for environment in setup_env.ENVIRONMENTS:
        pins = setup_env.read_pins(environment)
        assert [name for name in pins if name.startswith("nixl")] == ["nixl-cu12"]
        assert "pytest" in pins


def test_vllm_environment_holds_pytorch_for_cpu_and_none_of_its_cuda_companions() -> None:
    setup_env = load_setup_env(ROOT)
    (environment,) = [item for item in setup_env.ENVIRONMENTS if item.name == "vllm"]
    pins = setup_env.read_pins(environment)
    assert pins["torch"].endswith("+cpu")
    assert {"torchvision", "torchaudio", "torchcodec"}.isdisjoint(pins)


@pytest.mark.parametrize("line", ["httpx", "httpx>=0.28", "httpx=="])
def test_a_requirement_without_an_exact_version_is_refused(checkout: Path, line: str) -> None:
    with (checkout / "requirements/common.txt").open("a") as file:
        file.write(f"{line}\n")
    setup_env = load_setup_env(checkout)
    with pytest.raises(setup_env.SetupError, match="not pinned"):
        setup_env.read_pins(setup_env.ENVIRONMENTS[0])


@pytest.mark.parametrize(
    "file",
    [
        "requirements/vllm.txt",
        "requirements/common.txt",
        "scripts/setup_env.py",
        "scripts/vllm_cpu_dist/pyproject.toml",
    ],
)
def test_a_change_of_pins_or_set_up_asks_for_a_new_installation(checkout: Path, file: str) -> None:
    setup_env = load_setup_env(checkout)
    before = setup_env.engine_key(setup_env.ENVIRONMENTS[0])
    with (checkout / file).open("a") as changed:
        changed.write("# changed\n")
    assert setup_env.engine_key(setup_env.ENVIRONMENTS[0]) != before


def test_another_python_is_refused_with_the_version_that_is_needed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_env = load_setup_env(checkout)
    monkeypatch.setattr(setup_env, "WHEELS_PYTHON", (3, 99))
    with pytest.raises(setup_env.SetupError, match=r"the pins are for Python 3\.99"):
        setup_env.check_machine(setup_env.ENVIRONMENTS[0])


def test_too_little_disk_is_refused_before_anything_is_installed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_env = load_setup_env(checkout)
    usage = shutil.disk_usage(checkout)._replace(free=2**30)
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(setup_env.SetupError, match=r"1\.0 GiB are free"):
        setup_env.check_machine(setup_env.ENVIRONMENTS[0])
