"""Running somebody else's code for a bounded time.

Awaitables run in tasks of their own and are cancelled; plain functions run in daemon threads, which
Python can't stop: a thread past its time is abandoned, counted until it ends, and can't hold up the
exit of the process. How a call ended comes back as data (`Outcome`), so that a tool's `SystemExit`,
`StopIteration` or own cancellation never acts on the event loop.

Not covered: a coroutine that blocks without awaiting holds up the whole loop, and no time-out can help.
Code that a model wrote needs a sandbox; a thread is no boundary.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal

logger = logging.getLogger(__name__)

MAX_THREADS = 256
CANCEL_GRACE = 1.0  # seconds that a cancelled coroutine has to clean up before it is left behind


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: it "returned", "raised", ran into its "timeout", or there was "no_thread" for it."""

    how: Literal["returned", "raised", "timeout", "no_thread"]
    value: Any = None
    exception: BaseException | None = None


async def run_awaitable(awaitable: Awaitable[Any], timeout: float | None) -> Outcome:
    """Await for at most `timeout` seconds (None: for ever), then cancel.

    If the caller is cancelled, so is the awaitable.
    """
    task = asyncio.ensure_future(_settle(awaitable))
    try:
        await asyncio.wait({task}, timeout=timeout)
        if not task.done():
            return Outcome("timeout")
        # A tool that cancelled itself has failed; our own caller was not cancelled.
        return Outcome("raised", exception=asyncio.CancelledError()) if task.cancelled() else task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_GRACE)
            if not task.done():
                logger.warning("a tool's coroutine ignores its cancellation; it was left behind")


async def _settle(awaitable: Awaitable[Any]) -> Outcome:
    try:
        return Outcome("returned", await awaitable)
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as exception:  # the boundary: the caller decides what propagates
        return Outcome("raised", exception=exception)


async def run_function(
    function: Callable[[], Any], timeout: float | None, threads: Threads | None = None
) -> Outcome:
    """Call in a daemon thread for at most `timeout` seconds; await what it returns if that is awaitable.

    Time spent waiting for a free thread doesn't count. By default it is one of the process's `THREADS`.
    """
    started_at = 0.0

    def timed() -> Any:
        nonlocal started_at
        started_at = loop.time()
        return function()

    loop = asyncio.get_running_loop()
    outcome = await (threads or THREADS).run(timed, timeout)
    if outcome.how != "returned" or not inspect.isawaitable(outcome.value):
        return outcome
    left = None if timeout is None else max(0.0, timeout - (loop.time() - started_at))
    return await run_awaitable(outcome.value, left)


@dataclass(eq=False, slots=True)
class _Job:
    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    started: asyncio.Future[bool]  # True: a thread has it; False: there will never be one
    finished: asyncio.Future[Outcome]
    abandoned: bool = False
    ended: bool = False  # or refused a thread
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def call(self) -> Outcome:
        try:
            return Outcome("returned", self.context.run(self.function))
        except BaseException as exception:  # the boundary: the caller decides what propagates
            return Outcome("raised", exception=exception)

    def tell(self, future: asyncio.Future[Any], result: Any) -> None:
        """Set a future's result from another thread."""

        def set_result() -> None:
            if not future.done():
                future.set_result(result)

        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is waiting any more
            self.loop.call_soon_threadsafe(set_result)


class Threads:
    """Daemon threads, started when needed and kept, at most `bound` of them.

    Beyond the bound calls wait for a thread. When every thread has been abandoned by a call that never
    returned, nothing will ever be free, and calls end at once with "no_thread".

    The standard executors won't do: they join their threads at exit, so one hung tool would hang the run.
    """

    def __init__(self, bound: int = MAX_THREADS) -> None:
        self.bound = bound
        self._lock = threading.Lock()
        self._count = 0
        self._abandoned = 0
        self._idle: list[SimpleQueue[_Job]] = []  # inboxes; last in, first out keeps the warm thread busy
        self._waiting: deque[_Job] = deque()

    @property
    def abandoned(self) -> int:
        """Number of threads still inside a call that nobody waits for."""
        return self._abandoned

    async def run(self, function: Callable[[], Any], timeout: float | None) -> Outcome:
        """Call `function` in a thread; `timeout` counts from the moment it has one."""
        loop = asyncio.get_running_loop()
        job = _Job(function, loop, loop.create_future(), loop.create_future())
        self._submit(job)
        try:
            if not await job.started:
                return Outcome("no_thread")
            await asyncio.wait({job.finished}, timeout=timeout)
            return job.finished.result() if job.finished.done() else Outcome("timeout")
        finally:
            self._let_go(job)

    def _submit(self, job: _Job) -> None:
        with self._lock:
            if self._idle:
                self._idle.pop().put(job)
            elif self._count < self.bound:
                inbox: SimpleQueue[_Job] = SimpleQueue()
                inbox.put(job)
                threading.Thread(target=self._work, args=(inbox,), name="etude-tool", daemon=True).start()
                self._count += 1
            elif self._abandoned == self.bound:
                job.ended = True
                job.started.set_result(False)
                return
            else:
                self._waiting.append(job)
                return
        job.started.set_result(True)

    def _work(self, inbox: SimpleQueue[_Job]) -> None:
        while True:
            job = inbox.get()
            outcome = job.call()
            with self._lock:
                job.ended = True
                self._abandoned -= job.abandoned
                following = self._waiting.popleft() if self._waiting else None
                if following is None:
                    self._idle.append(inbox)
            job.tell(job.finished, outcome)
            if following is not None:
                following.tell(following.started, True)
                inbox.put(following)
            del job, outcome, following  # an idle thread holds on to nobody's result

    def _let_go(self, job: _Job) -> None:
        """Nobody waits for the job any more. No effect on one that has ended."""
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)
            elif not job.ended:
                job.abandoned = True
                self._abandoned += 1
                logger.warning(
                    "a tool is still running after its time-out or cancellation; its thread was abandoned "
                    "(%d of at most %d threads)",
                    self._abandoned,
                    self.bound,
                )
                if self._abandoned == self.bound:
                    for waiting in self._waiting:
                        waiting.ended = True
                        waiting.tell(waiting.started, False)
                    self._waiting.clear()


THREADS = Threads()  # one for the process: threads are what the process has a limited number of
