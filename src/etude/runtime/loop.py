"""Plain calls over async code: `run_sync(coroutine)`.

Environments, tools and samplers are async inside; people call plain functions. Where the calling thread
has no running event loop the coroutine runs right there. Inside one (a notebook, an async application)
it runs on the library's own loop thread while the caller waits, because a running loop can't be entered
twice. Ctrl-C cancels the work, waits for it to clean up, and is raised in the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_thread_loop: asyncio.AbstractEventLoop | None = None


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `coroutine` to its end and return its result, wherever the caller is."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop_thread())
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        with contextlib.suppress(CancelledError, TimeoutError):
            future.result(timeout=5)
        raise


def _loop_thread() -> asyncio.AbstractEventLoop:
    global _thread_loop
    with _lock:
        if _thread_loop is None:
            _thread_loop = asyncio.new_event_loop()
            context = contextvars.copy_context()
            target = _thread_loop.run_forever
            threading.Thread(target=context.run, args=(target,), name="etude-loop", daemon=True).start()
        return _thread_loop
