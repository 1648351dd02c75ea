"""Calls of somebody else's object: one at a time, in a thread of its own, each for a bounded time.

Such objects may be bound to the thread that made them (SQLite connections, browsers, windows) and seldom bear
two calls at once. What goes wrong in a call is an `InstanceError`, which ends an episode and never a run.

Not covered: a coroutine function runs on the event loop, where its object has no thread of its own.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from etude.errors import InstanceError, ToolError
from etude.protocols import Tool
from etude.tools.function import FunctionTool, as_tool
from etude.tools.running import Outcome, Threads, run_function

_lock = threading.Lock()
_spare: list[Threads] = []  # one thread each, kept for the next object


def _take_thread() -> Threads:
    with _lock:
        free = next((thread for thread in reversed(_spare) if not thread.abandoned), None)
        if free is not None:
            _spare.remove(free)
        return free or Threads(bound=1)


class ForeignCalls:
    """The way to one foreign object, from making it to closing it.

    Args:
        name: of the object, for messages.
        timeout: seconds for one call; None for no limit.

    Attributes:
        failure: the first call that failed, if one has; closing apart.
    """

    def __init__(self, name: str, timeout: float | None) -> None:
        self.name = name
        self.timeout = timeout
        self.failure: InstanceError | None = None
        self._thread = _take_thread()

    async def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function`, and await what it returns if that is awaitable.

        Raises:
            InstanceError: it raised, or took too long, or an earlier call still holds the thread.
        """
        try:
            return await self._call(functools.partial(function, *args, **kwargs), self._thread)
        except InstanceError as failure:
            self.failure = self.failure or failure
            raise

    async def close(self, function: Callable[[], Any]) -> Any:
        """Call what closes the object, from elsewhere if its thread is held: better so than not at all."""
        return await self._call(functools.partial(function), None if self._thread.abandoned else self._thread)

    async def _call(self, call: functools.partial[Any], thread: Threads | None) -> Any:
        outcome = await run_function(call, self.timeout, thread)
        if outcome.how == "returned":
            return outcome.value
        name = getattr(call.func, "__name__", type(call.func).__name__)
        raise self._failure(name, outcome) from outcome.exception

    def _failure(self, call: str, outcome: Outcome) -> InstanceError:
        exception, name = outcome.exception, f"{self.name}: {call}"
        if outcome.how == "timeout":
            return InstanceError(f"{name} did not answer within {self.timeout} seconds")
        if exception is None:
            return InstanceError(f"{name} can't run, an earlier call never ended")
        if not isinstance(exception, Exception | SystemExit | asyncio.CancelledError):
            raise exception
        return InstanceError(f"{name} raised {type(exception).__name__}: {exception}")

    def tool(self, method: Callable[..., Any], name: str | None = None) -> Tool:
        """A method as a tool. Its failures are the tool's: the model reads them, and the episode goes on."""
        tool = as_tool(method, name)
        if not isinstance(tool, FunctionTool) or inspect.iscoroutinefunction(method):
            return tool
        return replace(tool, function=functools.partial(self._call_tool, tool))

    async def _call_tool(self, tool: FunctionTool, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(tool.function, *args, **kwargs)
        outcome = await run_function(call, None, self._thread)  # the tool contract has a time-out of its own
        if outcome.exception is not None:
            raise outcome.exception
        if outcome.how != "returned":
            raise ToolError(f"{tool.name} can't run, an earlier call never ended")
        return outcome.value

    def release(self) -> None:
        """Nothing more will be called."""
        with _lock:
            _spare.append(self._thread)
