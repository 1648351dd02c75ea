"""Python callables as tools: functions, methods, partials and objects with `__call__`, sync or async."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etude.errors import ToolError
from etude.protocols import Tool
from etude.tools.arguments import read_arguments
from etude.tools.running import Outcome, run_awaitable, run_function
from etude.tools.schema import signature_of


@dataclass(slots=True)
class FunctionTool:
    """A callable as a `Tool`. Values arrive as JSON has them: an `Enum` parameter gets a member's value.

    Attributes:
        name: what the model calls it.
        description: what it does; may be empty.
        schema: JSON schema of the arguments.
        function: called with the arguments by name, except those in `positional`.
        positional: names of arguments that are passed by position, in order.
    """

    name: str
    description: str
    schema: Mapping[str, Any]
    function: Callable[..., Any]
    positional: tuple[str, ...] = ()

    async def __call__(self, arguments: str | Mapping[str, Any]) -> Any:
        outcome = await self.run(arguments, timeout=None)
        if outcome.exception is not None:
            raise outcome.exception
        if outcome.how != "returned":
            raise ToolError(f"tool {self.name!r} could not be run: no thread is free")
        return outcome.value

    async def run(self, arguments: str | Mapping[str, Any], timeout: float | None) -> Outcome:
        """Run for at most `timeout` seconds: async functions on the loop, others in a thread.

        Raises:
            ToolError: the arguments don't fit the schema.
        """
        given = read_arguments(arguments, self.schema)
        assert not isinstance(given, str), "a function's schema has properties"
        by_position = [given.pop(name) for name in self.positional if name in given]
        call = functools.partial(self.function, *by_position, **given)
        if _is_async(self.function):
            return await run_awaitable(call(), timeout)
        return await run_function(call, timeout)


def as_tool(obj: Any, name: str | None = None) -> Tool:
    """Make a tool of a callable.

    Args:
        obj: a function, method or `functools.partial`, an object with `__call__`, or a `Tool` already.
            Type hints and a docstring with `Args:` become the schema that chat templates show.
        name: what the model calls it. By default a function's `__name__`, an object's class name, a
            tool's own name.

    Raises:
        ToolError: it is not something that a model can call, or its name can't be written in a call.
    """
    if inspect.isclass(obj):
        raise ToolError(f"tool {obj.__name__} is a class; expected an object of it, {obj.__name__}(...)")
    if not callable(obj):
        raise ToolError(
            f"tool is {obj!r} of type {type(obj).__name__}; expected a function or an object with `__call__`"
        )
    name = _default_name(obj) if name is None else name
    if not isinstance(name, str) or not name.strip() or any(c in name for c in "<>\n"):
        raise ToolError(
            f"tool name is {name!r}; expected text without '<', '>' and line breaks, which a model can write "
            f"in a call: name it with tools={{'name': ...}}"
        )
    if isinstance(obj, Tool) and _is_async(obj):
        if obj.name != name:
            obj = copy.copy(obj)
            obj.name = name
        return obj
    signature = signature_of(obj)
    if inspect.isfunction(obj) and next(iter(signature.schema["properties"]), None) == "self":
        raise ToolError(f"tool {name!r} is a method without its object; pass the method of an object")
    return FunctionTool(name, signature.description, signature.schema, obj, signature.positional)


def tools_by_name(tools: Mapping[str, Any] | Sequence[Any] | None) -> dict[str, Tool]:
    """Tools by the names that a model calls them by.

    Args:
        tools: a mapping from names, or a list whose items are named as `as_tool` says; None is none.

    Raises:
        ToolError: two tools have one name, or something is not a tool.
    """
    if tools is None:
        return {}
    if isinstance(tools, Mapping):
        return {name: as_tool(obj, name) for name, obj in tools.items()}
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise ToolError(f"tools is {tools!r}; expected a list of tools or a mapping from names to tools")
    by_name: dict[str, Tool] = {}
    for tool in map(as_tool, tools):
        if tool.name in by_name:
            raise ToolError(
                f"two tools are named {tool.name!r}; expected a name for each: "
                f"pass a mapping, tools={{'name': ..., 'other_name': ...}}"
            )
        by_name[tool.name] = tool
    return by_name


def _default_name(obj: Any) -> str:
    if isinstance(obj, Tool) and _is_async(obj):
        return obj.name
    while isinstance(obj, functools.partial):
        obj = obj.func
    return getattr(obj, "__name__", type(obj).__name__)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
