"""A server of the admin contract without HTTP sockets: the real application over a fake engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine_plugins.admin import staging_claims
from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from tests.support.admin_server import AdminServer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def claims_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other servers of this machine may be about to stage while a test counts bytes."""
    monkeypatch.setattr(staging_claims, "_FOLDER", tmp_path)


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    path = tmp_path / "runtime"
    create_runtime_dir(path)
    return path


@pytest.fixture
def shared(runtime_dir: Path) -> SharedState:
    return SharedState(runtime_dir)


@pytest.fixture
def make_server(runtime_dir: Path) -> Callable[..., AdminServer]:
    """Servers over one runtime directory: more than one are the API processes of one engine."""

    def make(**options: object) -> AdminServer:
        return AdminServer(runtime_dir, **options)  # type: ignore[arg-type]

    return make
