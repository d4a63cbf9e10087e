"""A client of the admin routes, as openapi-python-client makes it of the document."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["GeneratedClient"]

PACKAGE = "generated_admin_client"
# A manifest as msgpack is bytes; the generator knows only media types that it can encode itself.
CONFIG = """
post_hooks: []
content_type_overrides:
  application/msgpack: application/octet-stream
"""


class GeneratedClient:
    """The package that was made of a document, in a folder.

    Args:
        document: of a server.
        folder: an empty one, which is put on the path of imports.
    """

    def __init__(self, document: dict[str, Any], folder: Path) -> None:
        (folder / "openapi.json").write_text(json.dumps(document))
        (folder / "config.yml").write_text(CONFIG)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "openapi_python_client", "generate"),
                *("--path", "openapi.json", "--config", "config.yml"),
                *("--output-path", PACKAGE, "--meta", "none", "--fail-on-warning"),
            ],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        sys.path.insert(0, str(folder))
        self.package = importlib.import_module(PACKAGE)
        self.models = importlib.import_module(f"{PACKAGE}.models")
        self.types = importlib.import_module(f"{PACKAGE}.types")
        self.operations = {
            f"{path.parent.name}.{path.stem}": self._module(path)
            for path in sorted((folder / PACKAGE / "api").glob("*/*.py"))
            if path.stem != "__init__"
        }

    def _module(self, path: Path) -> ModuleType:
        return importlib.import_module(f"{PACKAGE}.api.{path.parent.name}.{path.stem}")

    def with_token(self, url: str, token: str) -> Any:
        """A client of one server."""
        return self.package.AuthenticatedClient(
            base_url=f"{url}/admin/v1", token=token, timeout=60, raise_on_unexpected_status=True
        )
