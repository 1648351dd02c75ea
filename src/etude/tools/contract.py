"""The tool contract: what a call of a tool means, enforced here and not left to the tool.

A time-out, cancellation, arguments checked against the schema, a cap on what comes back; every failure
returns to the model as text and to the run as data. A model can't raise an exception by calling a tool.

Not covered: how a call is written (`environments`), caps in tokens or on the number of calls, sandboxes.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etude.errors import ConfigError, ToolError
from etude.protocols import Tool
from etude.tools.arguments import read_arguments
from etude.tools.function import FunctionTool
from etude.tools.running import Outcome, run_awaitable
from etude.types import ToolCall


@dataclass(frozen=True, slots=True)
class ToolLimits:
    """What a tool may take.

    Attributes:
        timeout: seconds for one call, counted from when it starts to run; None: no limit.
        max_characters: longest response, in characters; None: no limit. What is longer ends in "...".
    """

    timeout: float | None = 10.0
    max_characters: int | None = 100

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ConfigError(f"timeout is {self.timeout}; expected seconds > 0, or None for no limit")
        if self.max_characters is not None and self.max_characters < 0:
            raise ConfigError(f"max_characters is {self.max_characters}; expected >= 0, or None for no limit")


async def call_tool(
    tools: Mapping[str, Tool],
    name: str | None,
    arguments: str | Mapping[str, Any] | None,
    limits: ToolLimits,
    turn: int,
) -> ToolCall:
    """Call a tool as a model asked for it, and say what happened.

    Args:
        tools: by name, as `tools_by_name` makes them.
        name: the tool's name as the model wrote it; None if its call can't be parsed.
        arguments: the tag protocol's query, or named arguments; for a call that can't be parsed, its text.
        limits: time and length.
        turn: index of the model turn that called, from 0.

    Raises:
        asyncio.CancelledError: the caller was cancelled; so was the tool.
        KeyboardInterrupt: and whatever else is neither an `Exception` nor a `SystemExit`.
    """
    start = time.perf_counter()
    text, error = await _respond(tools, name, arguments, limits.timeout)
    response = cap(text, limits.max_characters)
    return ToolCall(
        name=name,
        arguments=dict(arguments) if isinstance(arguments, Mapping) else arguments,
        response=response,
        error=error,
        seconds=time.perf_counter() - start,
        truncated=response != text,
        turn=turn,
    )


async def _respond(
    tools: Mapping[str, Tool],
    name: str | None,
    arguments: str | Mapping[str, Any] | None,
    timeout: float | None,
) -> tuple[str, str | None]:
    """(text for the model, class of failure)"""
    if name is None or arguments is None:
        return f"Unknown tool call: {name or arguments or ''}", "malformed"
    if name not in tools:
        return f"Unknown tool {name}.", "unknown_tool"
    try:
        given = read_arguments(arguments, tools[name].schema)
    except ToolError as problem:
        return f"Invalid arguments: {problem}", "invalid_arguments"

    outcome = await _run(tools[name], given, timeout)
    if outcome.how == "timeout":
        return f"Tool error: {name} did not answer within {timeout:g} seconds.", "timeout"
    if outcome.how == "no_thread":
        return f"Tool error: {name} can't run, earlier calls of tools never ended.", "limit"
    if outcome.exception is not None:
        return f"Tool error: {_message(outcome.exception)}", "exception"
    try:
        return to_text(outcome.value), None
    except Exception as exception:  # the boundary: a value whose own `__str__` fails is the tool's failure
        return f"Tool error: {_message(exception)}", "exception"


async def _run(tool: Tool, arguments: str | dict[str, Any], timeout: float | None) -> Outcome:
    if isinstance(tool, FunctionTool):
        outcome = await tool.run(arguments, timeout)
    else:
        outcome = await run_awaitable(tool(arguments), timeout)
    failure = outcome.exception
    if failure is not None and not isinstance(failure, Exception | SystemExit | asyncio.CancelledError):
        raise failure
    return outcome


def to_text(value: Any) -> str:
    """A tool's result as text: JSON for lists, mappings, arrays and tensors, nothing for None, else `str`."""
    if value is None:
        return ""
    if callable(getattr(value, "tolist", None)):  # numpy and torch, without importing them
        value = value.tolist()
    if isinstance(value, Mapping | list | tuple):
        try:
            return json.dumps(value, ensure_ascii=False, default=_jsonable)
        except (TypeError, ValueError):  # keys that JSON doesn't have, a list that contains itself
            return str(value)
    return str(value)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if callable(getattr(value, "tolist", None)) else str(value)


def cap(text: str, max_characters: int | None) -> str:
    """At most `max_characters`: the first ones and "...", or without it where it doesn't fit."""
    if max_characters is None or len(text) <= max_characters:
        return text
    return text[:max_characters] if max_characters < 3 else text[: max_characters - 3] + "..."


def _message(exception: BaseException) -> str:
    try:
        return str(exception) or type(exception).__name__
    except Exception:  # the boundary: an exception may come with any `__str__`
        return type(exception).__name__
