import asyncio
import functools
import math
import threading

import pytest

from etude.errors import ToolError
from etude.protocols import Tool
from etude.tools.function import FunctionTool, as_tool, tools_by_name


def double(n: int) -> int:
    return 2 * n


async def slow_double(n: int) -> int:
    await asyncio.sleep(0)
    return 2 * n


class SimpleCalculatorTool:
    """The kind of tool that TRL's examples load."""

    name = "calculator"
    description = "Calculates."

    def __call__(self, query):
        return f"={query}"


class Echo:
    """A `Tool` that is not a function."""

    description = "Repeats."
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}  # noqa: RUF012

    def __init__(self, name):
        self.name = name

    async def __call__(self, arguments):
        return arguments["text"]


class Counter:
    def __init__(self):
        self.n = 0

    def add(self, n: int) -> int:
        self.n += n
        return self.n


def run_tool(tool, arguments):
    return asyncio.run(tool(arguments))


@pytest.mark.parametrize("function", [double, slow_double, functools.partial(double)])
def test_functions(function):
    tool = as_tool(function)
    assert isinstance(tool, Tool)
    assert run_tool(tool, "021") == 42
    assert run_tool(tool, {"n": 21}) == 42


def test_names():
    assert as_tool(double).name == "double"
    assert as_tool(functools.partial(functools.partial(double))).name == "double"
    assert as_tool(functools.lru_cache(double)).name == "double"
    assert as_tool(SimpleCalculatorTool()).name == "SimpleCalculatorTool"
    assert as_tool(Counter().add).name == "add"
    assert as_tool(double, "twice").name == "twice"
    assert as_tool(Echo("echo")).name == "echo"


def test_an_object_with_call():
    tool = as_tool(SimpleCalculatorTool())
    assert tool.description == "Calculates."
    assert run_tool(tool, "1+1") == "=1+1"


def test_a_method_keeps_its_object():
    tool = as_tool(Counter().add)
    assert [run_tool(tool, {"n": 2}), run_tool(tool, "3")] == [2, 5]


def test_arguments_by_position():
    assert run_tool(as_tool(math.sqrt), {"x": 9.0}) == 3.0
    assert run_tool(as_tool(lambda *args: args, "f"), "a") == ("a",)
    assert run_tool(as_tool(pow), {"base": 2, "exp": 5, "mod": None}) == 32


def test_a_tool_stays_itself_and_is_copied_to_be_renamed():
    echo = Echo("echo")
    assert as_tool(echo) is echo
    renamed = as_tool(echo, "other")
    assert (echo.name, renamed.name) == ("echo", "other")
    assert run_tool(renamed, {"text": "hi"}) == "hi"
    function = as_tool(double)
    assert isinstance(as_tool(function, "twice"), FunctionTool)
    assert function.name == "double"


def test_exceptions_go_through():
    with pytest.raises(ZeroDivisionError):
        run_tool(as_tool(lambda q: 1 / 0, "f"), "x")
    with pytest.raises(ToolError, match="'n' is 'x'"):
        run_tool(as_tool(double), "x")


def test_sync_functions_run_in_daemon_threads_and_async_ones_on_the_loop():
    def where(q):
        return threading.current_thread()

    async def where_async(q):
        return threading.current_thread()

    thread = run_tool(as_tool(where), "")
    assert thread.daemon
    assert thread is not threading.current_thread()
    assert run_tool(as_tool(where_async), "") is threading.current_thread()


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (SimpleCalculatorTool, r"is a class; expected an object of it, SimpleCalculatorTool\(...\)"),
        ("calculator", "tool is 'calculator' of type str; expected a function"),
        (None, "tool is None"),
        (lambda q: q, "tool name is '<lambda>'"),
        (Counter.add, "method without its object"),
    ],
)
def test_what_is_not_a_tool(obj, message):
    with pytest.raises(ToolError, match=message):
        as_tool(obj)


def test_tools_by_name():
    assert tools_by_name(None) == {}
    assert tools_by_name([]) == {}
    assert list(tools_by_name([double, SimpleCalculatorTool(), Echo("echo")])) == [
        "double",
        "SimpleCalculatorTool",
        "echo",
    ]
    by_name = tools_by_name({"a": double, "b": double})
    assert {name: tool.name for name, tool in by_name.items()} == {"a": "a", "b": "b"}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([double, double], "two tools are named 'double'"),
        ("double", "expected a list of tools"),
        (double, "expected a list of tools"),
        ({"<f>": double}, "tool name is '<f>'"),
        ({"": double}, "tool name is ''"),
        ({1: double}, "tool name is 1"),
    ],
)
def test_tools_that_cannot_be_named(tools, message):
    with pytest.raises(ToolError, match=message):
        tools_by_name(tools)
