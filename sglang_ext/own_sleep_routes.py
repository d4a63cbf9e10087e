"""SGLang's own release and resume of memory are refused: ours must be the only ones.

An update, or a second release, would meet memory that is not there and end the process; a resume
that nothing was released before ends SGLang's scheduler.
"""

from __future__ import annotations

from typing import Any

from engine_plugins.errors import ConflictError

__all__ = ["refuse"]


async def refuse(original: Any, *args: Any, **kwargs: Any) -> None:
    """Around the API process's two methods, which tell a client what they raise.

    Raises:
        ConflictError: always.
    """
    raise ConflictError(
        "this server's memory is released and mapped by POST /admin/v1/sleep and /admin/v1/wake; "
        "SGLang's own routes for it are closed"
    )
