"""What a loader hands to threads of its own, done in the thread that watches the loader.

What watches sees one thread. Some loaders copy in a pool, where nothing would be seen of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

__all__ = ["pools_done_here"]


@contextmanager
def pools_done_here() -> Iterator[None]:
    """Have what this thread submits to a pool of threads done at once, in this thread.

    Other threads' pools work as ever.
    """
    watched = threading.get_ident()
    submit = ThreadPoolExecutor.submit

    def done(
        pool: ThreadPoolExecutor, task: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        if threading.get_ident() != watched:
            return submit(pool, task, *args, **kwargs)
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:  # it belongs to whoever asks for the result
            future.set_exception(error)
        return future

    ThreadPoolExecutor.submit = done  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]
