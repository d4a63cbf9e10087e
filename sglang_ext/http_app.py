"""SGLang's application with our routes, for servers with several API processes.

SGLang's first process then serves nothing itself. The others import an application by its path,
and load no plugins of their own accord.
"""

from __future__ import annotations

from sglang.srt.entrypoints.http_server import app
from sglang.srt.plugins import load_plugins

from sglang_ext.admin_mount import add_routes

__all__ = ["app"]

load_plugins()
add_routes(app)
