import asyncio
import contextlib
import contextvars
import threading
import time

import pytest

from etude.tools import running
from etude.tools.running import Threads, run_awaitable, run_function


async def wait_until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


def test_calls_beyond_the_bound_wait_for_a_thread():
    async def main():
        threads = Threads(bound=2)
        start = time.perf_counter()
        # A time-out shorter than the wait: only running counts.
        outcomes = await asyncio.gather(*(threads.run(lambda: time.sleep(0.04), 0.3) for _ in range(20)))
        return {o.how for o in outcomes}, time.perf_counter() - start

    hows, seconds = asyncio.run(main())
    assert hows == {"returned"}
    assert seconds > 0.39


def test_threads_are_kept():
    async def main():
        threads = Threads()
        return {(await threads.run(threading.get_ident, 1)).value for _ in range(20)}

    assert len(asyncio.run(main())) == 1


def test_abandoned_threads_are_counted_until_they_end():
    async def main():
        threads, gate = Threads(bound=2), threading.Event()
        assert (await threads.run(gate.wait, 0.02)).how == "timeout"
        assert threads.abandoned == 1
        assert (await threads.run(lambda: "alive", 1)).value == "alive"
        gate.set()
        await wait_until(lambda: threads.abandoned == 0)
        assert (await asyncio.gather(*(threads.run(lambda: 1, 1) for _ in range(4))))[3].value == 1

    asyncio.run(main())


def test_no_thread_is_left():
    async def main():
        threads, gate = Threads(bound=2), threading.Event()
        hung = [asyncio.create_task(threads.run(gate.wait, 0.05)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting = asyncio.create_task(threads.run(lambda: 1, 5))  # queued when the last thread is given up
        assert [(await task).how for task in hung] == ["timeout", "timeout"]
        assert (await waiting).how == "no_thread"
        assert (await threads.run(lambda: 1, 5)).how == "no_thread"
        assert threads.abandoned == 2
        gate.set()
        await wait_until(lambda: threads.abandoned == 0)
        assert (await threads.run(lambda: 1, 5)).value == 1

    asyncio.run(main())


def test_cancelling_a_waiting_call_takes_it_out():
    async def main():
        threads, gate, calls = Threads(bound=1), threading.Event(), []
        running_call = asyncio.create_task(threads.run(gate.wait, None))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(threads.run(lambda: calls.append(1), None))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert threads.abandoned == 0
        gate.set()
        await running_call
        await threads.run(lambda: calls.append(2), None)
        assert calls == [2]

    asyncio.run(main())


@pytest.mark.parametrize("exception", [ValueError, StopIteration, SystemExit, KeyboardInterrupt])
def test_every_exception_is_data(exception):
    def fail():
        raise exception("x")

    async def fail_async():
        raise exception("x")

    async def main():
        return await run_function(fail, 1), await run_awaitable(fail_async(), 1)

    in_thread, on_loop = asyncio.run(main())
    assert type(in_thread.exception) is exception
    # Python itself turns a StopIteration that leaves a coroutine into a RuntimeError.
    assert type(on_loop.exception) is (RuntimeError if exception is StopIteration else exception)
    assert in_thread.how == on_loop.how == "raised"


def test_a_coroutine_that_cancels_itself_has_failed():
    async def quit_early():
        raise asyncio.CancelledError

    outcome = asyncio.run(run_awaitable(quit_early(), 1))
    assert outcome.how == "raised"
    assert isinstance(outcome.exception, asyncio.CancelledError)


def test_an_awaitable_result_is_awaited_in_the_time_that_is_left():
    async def later(seconds):
        await asyncio.sleep(seconds)
        return "done"

    def start(seconds):
        time.sleep(0.2)
        return later(seconds)

    async def main():
        quick = await run_function(lambda: start(0), 0.5)
        slow = await run_function(lambda: start(0.4), 0.5)
        return quick.value, slow.how

    assert asyncio.run(main()) == ("done", "timeout")


def test_a_coroutine_that_ignores_its_cancellation_is_left_behind(monkeypatch, caplog):
    monkeypatch.setattr(running, "CANCEL_GRACE", 0.05)

    async def stubborn():
        for _ in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.1)

    outcome = asyncio.run(run_awaitable(stubborn(), 0.02))
    assert outcome.how == "timeout"
    assert "ignores its cancellation" in caplog.text


def test_context_variables_reach_the_thread():
    variable = contextvars.ContextVar("variable")

    async def main():
        variable.set("seen")
        return await run_function(variable.get, 1)

    assert asyncio.run(main()).value == "seen"


def test_a_result_for_a_closed_loop_is_dropped():
    gate, ended = threading.Event(), threading.Event()
    threads = Threads(bound=1)

    def tool():
        gate.wait()
        ended.set()

    assert asyncio.run(threads.run(tool, 0.02)).how == "timeout"
    gate.set()
    assert ended.wait(5)
    assert asyncio.run(threads.run(lambda: "next", 5)).value == "next"
