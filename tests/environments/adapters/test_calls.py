"""Calls of somebody else's object, for real: threads, time-outs, failures."""

import asyncio
import sqlite3
import sys
import threading
import time

import pytest

from etude.environments.adapters.calls import ForeignCalls
from etude.errors import InstanceError
from etude.tools.contract import ToolLimits, call_tool


def test_calls_have_one_thread_from_the_first_to_the_last():
    async def play():
        calls = ForeignCalls("db", 5.0)
        database = await calls(sqlite3.connect, ":memory:")  # it refuses other threads
        await calls(database.execute, "create table t (x)")

        def add(x: int) -> int:
            """Add a row.

            Args:
                x: what to add.
            """
            database.execute("insert into t values (?)", (x,))
            return threading.get_ident()

        tools = {"add": calls.tool(add, "add")}
        answers = [await call_tool(tools, "add", {"x": i}, ToolLimits(), 0) for i in (3, 4)]
        assert [answer.error for answer in answers] == [None, None]
        assert len({answer.response for answer in answers} | {str(await calls(threading.get_ident))}) == 1
        total = await calls(lambda: database.execute("select sum(x) from t").fetchone())
        assert total == (7,)
        with pytest.raises(sqlite3.ProgrammingError):
            database.execute("select 1")
        await calls(database.close)
        calls.release()

    asyncio.run(play())


def test_calls_of_one_object_follow_one_another_and_those_of_two_do_not():
    async def play():
        first, second = ForeignCalls("first", 5.0), ForeignCalls("second", 5.0)
        running, most = [], {}

        def work(name):
            running.append(name)
            most[name] = max(most.get(name, 0), running.count(name))
            most["both"] = max(most.get("both", 0), len(running))
            time.sleep(0.05)
            running.remove(name)

        await asyncio.gather(*(calls(work, calls.name) for calls in (first, second) for _ in range(3)))
        assert most == {"first": 1, "second": 1, "both": 2}
        first.release()
        second.release()

    asyncio.run(play())


def test_failures_say_which_call():
    async def play():
        calls = ForeignCalls("duck", 0.05)

        def quack():
            raise KeyError("no pond")

        async def late():
            await asyncio.sleep(9)

        with pytest.raises(InstanceError, match="duck: quack raised KeyError: 'no pond'") as caught:
            await calls(quack)
        assert isinstance(caught.value.__cause__, KeyError)
        assert calls.failure is caught.value
        with pytest.raises(InstanceError, match=r"duck: late did not answer within 0\.05 seconds"):
            await calls(late)
        with pytest.raises(InstanceError, match="duck: exit raised SystemExit"):
            await calls(sys.exit)
        assert "quack" in str(calls.failure), "the first"

        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            await calls(interrupt)
        calls.release()

    asyncio.run(play())


def test_a_hung_call_holds_its_object_and_nothing_else():
    async def play():
        calls, free = ForeignCalls("duck", 0.05), threading.Event()
        with pytest.raises(InstanceError, match="did not answer"):
            await calls(free.wait)
        with pytest.raises(InstanceError, match="duck: print can't run, an earlier call never ended"):
            await calls(print)

        def look() -> str:
            """Look."""
            return "seen"

        answer = await call_tool({"look": calls.tool(look)}, "look", {}, ToolLimits(), 0)
        assert answer.error == "exception"
        assert "look can't run, an earlier call never ended" in answer.response
        assert await calls.close(threading.get_ident) != threading.main_thread().ident, (
            "closed from elsewhere"
        )
        calls.release()
        other = ForeignCalls("other", 5.0)
        assert await other(int, "3") == 3, "its thread isn't the one that hangs"
        other.release()
        free.set()

    asyncio.run(play())


def test_a_tool_that_takes_too_long_is_the_models_to_read():
    async def play():
        calls, free = ForeignCalls("duck", None), threading.Event()

        def wait() -> str:
            """Wait."""
            free.wait()
            return ""

        async def sleep() -> str:
            """Sleep."""
            await asyncio.sleep(9)
            return ""

        for function in (sleep, wait):
            tools = {function.__name__: calls.tool(function)}
            answer = await call_tool(tools, function.__name__, {}, ToolLimits(timeout=0.05), 0)
            assert answer.error == "timeout"
        assert calls.failure is None
        calls.release()
        free.set()

    asyncio.run(play())


def test_threads_are_used_again():
    async def play():
        idents = set()
        for _ in range(5):
            calls = ForeignCalls("duck", 5.0)
            idents.add(await calls(threading.get_ident))
            calls.release()
        assert len(idents) == 1

    asyncio.run(play())
