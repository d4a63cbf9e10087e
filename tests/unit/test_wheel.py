"""The built wheel holds every package of the project, and nothing else."""

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = [ROOT, ROOT / "kernels"]
NOT_SHIPPED = {"tests", "examples", "scripts"}


def packages() -> dict[str, Path]:
    """Map the name of each package under a source root to its folder."""
    found = [init.parent for root in SOURCE_ROOTS for init in sorted(root.glob("*/__init__.py"))]
    return {folder.name: folder for folder in found if folder.name not in NOT_SHIPPED}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel with the installed backend: no network, nothing left in the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def shipped(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def metadata(wheel: zipfile.ZipFile, file: str) -> str:
    (name,) = [name for name in wheel.namelist() if name.endswith(f".dist-info/{file}")]
    return wheel.read(name).decode()


def test_the_packages_found_in_the_checkout_include_the_known_ones() -> None:
    assert {"engine_plugins", "vllm_ext"} <= set(packages())


def test_wheel_holds_every_module_of_every_package(wheel: zipfile.ZipFile) -> None:
    expected = {
        module.relative_to(folder.parent).as_posix()
        for folder in packages().values()
        for kind in ("*.py", "*.c")
        for module in folder.rglob(kind)
    }
    assert expected - shipped(wheel) == set()


def test_wheel_holds_nothing_but_the_packages(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in shipped(wheel)} == set(packages())


def test_every_package_in_the_wheel_is_marked_as_typed(wheel: zipfile.ZipFile) -> None:
    expected = {f"{name}/py.typed" for name in packages()}
    assert expected - shipped(wheel) == set()


def test_entry_points_name_modules_that_the_wheel_holds(wheel: zipfile.ZipFile) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(metadata(wheel, "entry_points.txt"))
    assert {"vllm.general_plugins", "vllm.endpoint_plugins"} <= set(parser.sections())
    for group in parser.sections():
        for target in parser[group].values():
            module, _, attribute = target.partition(":")
            assert f"{module.replace('.', '/')}.py" in shipped(wheel), target
            assert attribute.isidentifier(), target


def test_wheel_metadata_names_version_extras_and_license(wheel: zipfile.ZipFile) -> None:
    lines = metadata(wheel, "METADATA").splitlines()
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra: ")}
    assert extras == {"vllm", "sglang", "nixl", "memory-saver", "dev"}
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.11" in lines
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")
