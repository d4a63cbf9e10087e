"""Build or refresh one engine environment inside the checkout: `setup_env.py vllm`.

Needs Python 3.11 and nothing else. The environment ends up as exactly what
`requirements/<engine>.txt` pins, plus this project as an editable install. A run that
finds nothing to do takes a moment: each step leaves a stamp, keyed by all that it read.
An interrupted run is continued by the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
WHEELS_PYTHON = (3, 11)
KEPT_BESIDES_PINS = {"pip", "engine-plugins"}
# Hundreds of model families of which a test run imports two or three.
NOT_BYTE_COMPILED = r"/transformers/models/"


@dataclass(frozen=True, kw_only=True)
class EngineEnvironment:
    """One engine's environment.

    `stand_ins` are folders of distributions without modules, by name, for packages that
    ask for an engine under the name of its GPU build.
    """

    name: str
    needed_disk_gib: float
    stand_ins: dict[str, Path] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return ROOT / ".venv" / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def requirement_files(self) -> list[Path]:
        return [ROOT / "requirements" / f"{self.name}.txt", ROOT / "requirements" / "common.txt"]

    def say(self, text: str) -> None:
        print(f"setup {self.name}: {text}", flush=True)


ENVIRONMENTS = [
    EngineEnvironment(
        name="vllm",
        needed_disk_gib=6.0,
        stand_ins={"vllm": ROOT / "scripts" / "vllm_cpu_dist"},
    ),
    EngineEnvironment(name="sglang", needed_disk_gib=5.0),
    EngineEnvironment(name="megatron", needed_disk_gib=3.0),
    EngineEnvironment(name="trainers", needed_disk_gib=2.0),
]
"""The two engines, and trainers without an engine; each one is set up alike."""


class SetupError(Exception):
    """The set-up cannot go on; the message says what was seen and what to do."""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and prepare the environment it names."""
    environments = {environment.name: environment for environment in ENVIRONMENTS}
    parser = argparse.ArgumentParser(description="Build or refresh one engine environment.")
    parser.add_argument("engine", choices=sorted(environments))
    environment = environments[parser.parse_args(argv).engine]
    try:
        with exclusive(environment):
            ensure_engine(environment)
            ensure_project(environment)
    except SetupError as error:
        print(f"setup {environment.name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the next run continues here", file=sys.stderr)
        return 130
    return 0


def ensure_engine(environment: EngineEnvironment) -> None:
    """Install the pins unless the stamp says that they are there."""
    key = engine_key(environment)
    if is_current(environment, "engine", key):
        return
    started = time.monotonic()
    check_machine(environment)
    create_environment(environment)
    install_torch(environment)
    install_pins(environment)
    install_stand_ins(environment)
    remove_unpinned(environment)
    byte_compile(environment)
    mark_current(environment, "engine", key)
    environment.say(f"engine installed in {time.monotonic() - started:.0f} s")


def ensure_project(environment: EngineEnvironment) -> None:
    """Install this checkout as editable, again whenever its metadata changed."""
    sources = [ROOT / "pyproject.toml", ROOT / "engine_plugins" / "__init__.py"]
    key = f"{engine_key(environment)} {digest(sources)}"
    if is_current(environment, "project", key):
        return
    environment.say("installing this checkout (editable)")
    pip_install(environment, "--no-build-isolation", "-e", str(ROOT))
    mark_current(environment, "project", key)
    environment.say(f"ready in {environment.folder.relative_to(ROOT)}")


def check_machine(environment: EngineEnvironment) -> None:
    """Refuse early where the installation would fail late."""
    if platform.system() != "Linux":
        raise SetupError(f"the CPU engines run on Linux only; this is {platform.system()}.")
    if sys.version_info[:2] != WHEELS_PYTHON:
        wanted = ".".join(map(str, WHEELS_PYTHON))
        raise SetupError(
            f"this is Python {platform.python_version()} ({sys.executable}), and the pins are "
            f"for Python {wanted}. Install it and run `make PYTHON=/path/to/python{wanted} ...`."
        )
    free_gib = shutil.disk_usage(ROOT).free / 2**30
    if free_gib < environment.needed_disk_gib and not environment.python.exists():
        raise SetupError(
            f"{free_gib:.1f} GiB are free at {ROOT}, and this environment needs about "
            f"{environment.needed_disk_gib:.0f} GiB. Make room and run this again."
        )


def create_environment(environment: EngineEnvironment) -> None:
    """Create the virtual environment, anew if the checkout was moved since."""
    record = environment.folder / "pyvenv.cfg"
    if environment.python.exists() and str(environment.folder) in record.read_text():
        return
    environment.say(f"creating {environment.folder.relative_to(ROOT)}")
    try:
        venv.create(environment.folder, clear=True, symlinks=True, with_pip=True)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(environment.folder, ignore_errors=True)
        raise SetupError(
            f"{sys.executable} cannot create a virtual environment ({error}). On Debian and "
            "Ubuntu the package python3.11-venv brings what is missing."
        ) from error


def install_torch(environment: EngineEnvironment) -> None:
    """Install PyTorch's CPU build, from its own index only where pip does not see it yet."""
    pin = f"torch=={read_pins(environment)['torch']}"
    probe = ["install", "--dry-run", "--no-deps", "--no-input", "--quiet", pin]
    if pip(environment, *probe, silent=True) == 0:
        index, origin = [], "from where pip already looks"
    else:
        index, origin = ["--extra-index-url", TORCH_CPU_INDEX], f"from {TORCH_CPU_INDEX}"
    environment.say(f"installing {pin} {origin}")
    pip_install(environment, *index, pin)


def install_pins(environment: EngineEnvironment) -> None:
    """Install every pin as it stands; pip resolves nothing."""
    pins, size_gib = read_pins(environment), environment.needed_disk_gib
    environment.say(f"installing {len(pins)} pinned distributions, up to {size_gib:.0f} GiB")
    pip_install(environment, "-r", str(environment.requirement_files[0]))


def install_stand_ins(environment: EngineEnvironment) -> None:
    """Build and install the distributions without modules."""
    for folder in environment.stand_ins.values():
        pip_install(environment, "--no-build-isolation", "--force-reinstall", str(folder))


def remove_unpinned(environment: EngineEnvironment) -> None:
    """Uninstall what an earlier set of pins left behind."""
    wanted = {*read_pins(environment), *environment.stand_ins, *KEPT_BESIDES_PINS}
    if extra := sorted(installed(environment) - wanted):
        environment.say(f"removing {', '.join(extra)}")
        pip(environment, "uninstall", "--yes", "--quiet", *extra)


def byte_compile(environment: EngineEnvironment) -> None:
    """Compile on all cores once, instead of in every engine process of the first runs.

    Under PYTHONDONTWRITEBYTECODE each start of an engine would compile everything anew.
    """
    environment.say("compiling to bytecode")
    options = ["-qq", "-j", "0", "-x", NOT_BYTE_COMPILED]
    # A few packages ship templates that are not Python: a non-zero status is usual.
    run([str(environment.python), "-m", "compileall", *options, str(environment.folder / "lib")])


def installed(environment: EngineEnvironment) -> set[str]:
    """Return the normalized names of all distributions in the environment."""
    listing = "import importlib.metadata as m; print(*{d.name for d in m.distributions()})"
    command = [str(environment.python), "-c", listing]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {normalized(name) for name in names}


def read_pins(environment: EngineEnvironment) -> dict[str, str]:
    """Map normalized names to versions; refuses a line other than `name==version`."""
    pins: dict[str, str] = {}
    for file in environment.requirement_files:
        for line in file.read_text().splitlines():
            if not line or line.startswith(("#", "-r ")):
                continue
            name, separator, version = line.partition("==")
            if not separator or not version:
                raise SetupError(f"{file.name}: {line!r} is not pinned; write name==version.")
            pins[normalized(name)] = version
    return pins


def normalized(name: str) -> str:
    """Spell a distribution's name as package indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip_install(environment: EngineEnvironment, *arguments: str) -> None:
    """Install exactly what is named, without its dependencies."""
    options = ["--no-deps", "--no-compile", "--no-input", "--quiet", "--quiet"]
    if pip(environment, "install", *options, *arguments) != 0:
        raise SetupError(
            f"`pip install {' '.join(arguments)}` failed; pip's own message is above. The first "
            "set-up needs a package index within reach. Run it again: it continues here."
        )


def pip(environment: EngineEnvironment, *arguments: str, silent: bool = False) -> int:
    """Run the environment's pip and return its exit status."""
    options = ["--disable-pip-version-check", *arguments]
    return run([str(environment.python), "-m", "pip", *options], silent=silent)


def run(command: list[str], *, silent: bool = False) -> int:
    """Run a command that must not ask questions and return its exit status."""
    output = subprocess.DEVNULL if silent else None
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
    ).returncode


@contextlib.contextmanager
def exclusive(environment: EngineEnvironment) -> Iterator[None]:
    """Let two set-ups of one environment wait for each other."""
    environment.folder.parent.mkdir(exist_ok=True)
    with environment.folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            environment.say("waiting for another set-up of this environment")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def engine_key(environment: EngineEnvironment) -> str:
    """Digest of all that decides what is installed: pins, stand-ins, place, this script."""
    stand_ins = [folder / "pyproject.toml" for folder in environment.stand_ins.values()]
    files = [*environment.requirement_files, *stand_ins, Path(__file__)]
    return digest(files, str(environment.folder))


def digest(files: list[Path], *texts: str) -> str:
    """SHA-256 over the contents of files and over texts."""
    parts = [*(file.read_bytes() for file in files), *(text.encode() for text in texts)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def stamp(environment: EngineEnvironment, step: str) -> Path:
    """File that records the key under which a step was completed."""
    return environment.folder / f".{step}-stamp"


def is_current(environment: EngineEnvironment, step: str, key: str) -> bool:
    """Whether a step was completed under this key."""
    file = stamp(environment, step)
    return file.exists() and file.read_text() == key and environment.python.exists()


def mark_current(environment: EngineEnvironment, step: str, key: str) -> None:
    """Record that a step was completed under this key."""
    stamp(environment, step).write_text(key)


if __name__ == "__main__":
    sys.exit(main())
