import asyncio
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import ConfigError
from etude.tools import running
from etude.tools.calculator import calculator
from etude.tools.contract import ToolLimits, call_tool, cap, to_text
from etude.tools.function import tools_by_name

FREE = ToolLimits(timeout=5.0, max_characters=None)


def call(tool, arguments="x", limits=FREE, name="tool"):
    return asyncio.run(call_tool(tools_by_name({"tool": tool}), name, arguments, limits, turn=2))


def raising(exception):
    def tool(q):
        raise exception

    return tool


class HostileError(Exception):
    def __str__(self):
        raise ValueError("no text for you")


def test_a_call_that_succeeds():
    result = call(calculator, "738*46+19")
    assert (result.name, result.arguments, result.response) == ("tool", "738*46+19", "33967")
    assert (result.error, result.truncated, result.turn) == (None, False, 2)
    assert 0 < result.seconds < 5
    named = call(calculator, {"expression": "1+1"})
    assert (named.arguments, named.response) == ({"expression": "1+1"}, "2")


@pytest.mark.parametrize(
    ("name", "arguments", "error", "response"),
    [
        ("other", "x", "unknown_tool", "Unknown tool other."),
        (None, "<request>gibberish", "malformed", "Unknown tool call: <request>gibberish"),
        (None, None, "malformed", "Unknown tool call: "),
        ("tool", None, "malformed", "Unknown tool call: tool"),
        (
            "tool",
            {"a": 1},
            "invalid_arguments",
            "Invalid arguments: missing argument 'expression'; expected 'expression' (string)",
        ),
    ],
)
def test_calls_that_reach_no_tool(name, arguments, error, response):
    result = call(calculator, arguments, name=name)
    assert (result.error, result.response) == (error, response)


@pytest.mark.parametrize(
    ("exception", "response"),
    [
        (ValueError("bad luck"), "Tool error: bad luck"),
        (KeyError("k"), "Tool error: 'k'"),
        (ValueError(), "Tool error: ValueError"),
        (TimeoutError("the network's own"), "Tool error: the network's own"),
        (SystemExit(3), "Tool error: 3"),
        (StopIteration(), "Tool error: StopIteration"),
        (asyncio.CancelledError(), "Tool error: CancelledError"),
        (HostileError(), "Tool error: HostileError"),
    ],
)
def test_a_tool_that_raises(exception, response):
    result = call(raising(exception))
    assert (result.error, result.response) == ("exception", response)

    async def tool(q):
        raise exception

    assert call(tool).error == "exception"


def test_keyboard_interrupt_propagates():
    with pytest.raises(KeyboardInterrupt):
        call(raising(KeyboardInterrupt()))


def test_a_tool_that_never_returns(monkeypatch, caplog):
    monkeypatch.setattr(running, "THREADS", running.Threads())
    gate = threading.Event()
    start = time.perf_counter()
    result = call(lambda q: gate.wait(), limits=ToolLimits(timeout=0.1))
    assert time.perf_counter() - start < 1
    assert (result.error, result.response) == (
        "timeout",
        "Tool error: tool did not answer within 0.1 seconds.",
    )
    assert 0.1 <= result.seconds < 1
    assert running.THREADS.abandoned == 1
    assert "its thread was abandoned (1 of at most 256 threads)" in caplog.text
    gate.set()


def test_a_hung_tool_does_not_hold_up_the_exit():
    script = """
import asyncio, sys, time
from etude.tools.contract import ToolLimits, call_tool
from etude.tools.function import tools_by_name
tools = tools_by_name({"hang": lambda q: time.sleep(60)})
result = asyncio.run(call_tool(tools, "hang", "", ToolLimits(timeout=0.1), 0))
print(result.error, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "timeout False\n"), done.stderr


def test_threads_used_up_by_hung_tools(monkeypatch):
    monkeypatch.setattr(running, "THREADS", running.Threads(bound=1))
    gate = threading.Event()
    assert call(lambda q: gate.wait(), limits=ToolLimits(timeout=0.02)).error == "timeout"
    result = call(lambda q: "fine")
    gate.set()
    assert result.error == "limit"
    assert result.response == "Tool error: tool can't run, earlier calls of tools never ended."


def test_sync_tools_run_concurrently():
    tools = tools_by_name({"sleep": lambda q: time.sleep(0.1)})

    async def main():
        return await asyncio.gather(*(call_tool(tools, "sleep", "", FREE, 0) for _ in range(20)))

    start = time.perf_counter()
    assert [result.error for result in asyncio.run(main())] == [None] * 20
    assert time.perf_counter() - start < 0.6


def test_an_async_tool_is_cancelled_by_its_time_out():
    events = []

    async def tool(q):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            events.append("cleaned up")
            raise

    assert call(tool, limits=ToolLimits(timeout=0.05)).error == "timeout"
    assert events == ["cleaned up"]


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_cancelling_the_call_cancels_the_tool(kind):
    events, gate = [], threading.Event()

    async def async_tool(q):
        events.append("started")
        try:
            await asyncio.sleep(60)
        finally:
            events.append("cleaned up")

    def sync_tool(q):
        events.append("started")
        gate.wait()

    tools = tools_by_name({"async": async_tool, "sync": sync_tool})

    async def main():
        task = asyncio.create_task(call_tool(tools, kind, "", FREE, 0))
        while not events:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    start = time.perf_counter()
    asyncio.run(main())
    gate.set()
    assert time.perf_counter() - start < 1
    assert events == (["started", "cleaned up"] if kind == "async" else ["started"])


def test_a_coroutine_from_a_sync_function_is_awaited():
    async def later(q):
        return f"later {q}"

    assert call(lambda q: later(q)).response == "later x"


def test_a_tool_that_is_no_function():
    class Remote:
        name, description = "tool", "Far away."
        schema = {"properties": {"q": {"type": "integer"}}, "required": ["q"]}  # noqa: RUF012

        async def __call__(self, arguments):
            if arguments["q"] == 0:
                await asyncio.sleep(60)
            return arguments

    assert call(Remote(), "7").response == '{"q": 7}'
    assert call(Remote(), "0", limits=ToolLimits(timeout=0.05)).error == "timeout"
    assert call(Remote(), "seven").error == "invalid_arguments"


class Unprintable:
    def __str__(self):
        raise RuntimeError("unprintable")


LOOP: list = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is\x00", "as it is\x00"),
        (None, ""),
        (3, "3"),
        (2.5, "2.5"),
        (True, "True"),
        ([1, "é", None], '[1, "é", null]'),
        ({"a": (1, 2)}, '{"a": [1, 2]}'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ({"t": torch.ones(2), "f": {1}}, '{"t": [1.0, 1.0], "f": "{1}"}'),
        (LOOP, "[[...]]"),
        (torch.tensor(3.0, requires_grad=True), "3.0"),
        (torch.tensor([1, 2]), "[1, 2]"),
        (np.float32(0.5), "0.5"),
        (np.array([[True]]), "[[true]]"),
        (b"raw", "b'raw'"),
    ],
)
def test_results_become_text(value, text):
    assert to_text(value) == text
    assert call(lambda q: value).response == text


@pytest.mark.parametrize("value", [Unprintable(), [Unprintable()], 10**5000], ids=["own", "nested", "long"])
def test_a_result_that_cannot_be_text(value):
    assert call(lambda q: value).error == "exception"


@pytest.mark.parametrize(
    ("limit", "text"), [(None, "abcdef"), (6, "abcdef"), (5, "ab..."), (3, "..."), (2, "ab"), (0, "")]
)
def test_the_cap(limit, text):
    result = call(lambda q: "abcdef", limits=ToolLimits(max_characters=limit))
    assert (result.response, result.truncated) == (text, text != "abcdef")


@given(st.text(), st.integers(0, 20))
def test_the_cap_holds(text, limit):
    capped = cap(text, limit)
    assert len(capped) <= limit
    assert (capped == text) == (len(text) <= limit) or text.endswith("...")


def test_errors_are_capped_too():
    result = call(raising(ValueError("x" * 500)), limits=ToolLimits())
    assert result.response == "Tool error: " + "x" * 85 + "..."
    assert (len(result.response), result.truncated) == (100, True)


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"timeout": float("inf")}, {"max_characters": -1}])
def test_limits_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ToolLimits(**settings)
