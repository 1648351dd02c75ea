"""Messages as chat templates take them, with their data marked.

System, developer and assistant messages are control text: an added token in them is meant. All other messages
(user, tool) are data, and so is what they hide in their contents: control tokens in them stand between two
marks, which rendering keeps.

Not covered: what is done with the marks (`rendering`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etude.errors import DataError

Messages = Sequence[Mapping[str, Any]]
_AUTHOR_ROLES = frozenset({"system", "developer", "assistant"})


def marked_messages(messages: Messages, control: re.Pattern[str]) -> tuple[list[dict[str, Any]], str]:
    """Copies of the messages with marks around what matches `control` in data, and the marks.

    These are two characters that occur nowhere in the conversation.

    Raises:
        DataError: a message isn't one.
    """
    _check(messages)
    marks = unused_characters(json.dumps(messages, ensure_ascii=False, default=str))
    replacement = f"{marks[0]}\\g<0>{marks[1]}"
    marked = [
        m if m["role"] in _AUTHOR_ROLES else _mark(m, control, replacement) for m in map(_plain, messages)
    ]
    return marked, marks


def task_messages(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation that a task is: its `messages`, or its `prompt` (or `query`), as messages or as text.

    Raises:
        DataError: it has none of these.
    """
    for column in ("messages", "prompt", "query"):
        given = task.get(column)
        if isinstance(given, str):
            return [{"role": "user", "content": given}]
        if isinstance(given, list | tuple) and given:
            _check(given)
            return [_plain(message) for message in given]
    raise DataError(
        "a task of a chat needs a column 'messages', or 'prompt' as messages or text; this one has "
        f"{', '.join(task) or 'none'}"
    )


def with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as JSON."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_map_arguments(call, _unparsed) for call in message["tool_calls"]]}


def _check(messages: Messages) -> None:
    if not messages:
        raise DataError("the conversation has no messages; expected at least one")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            found = ", ".join(map(repr, message)) if isinstance(message, Mapping) else str(message)[:60]
            raise DataError(
                f"message {position} has no role; its keys are {found or 'missing'}. "
                "Expected {'role': 'user', 'content': ...}"
            )


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates read it: keys without a value gone, a call's arguments a mapping.

    Tables fill up keys that other rows have, and templates ask whether a key is there (transformers drops
    them too). Arguments come as JSON from OpenAI's interface; most templates would quote that once more.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in plain:
        plain["tool_calls"] = [_map_arguments(call, _parsed) for call in plain["tool_calls"]]
    return plain


def _map_arguments(call: Any, change: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _map_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else dict(call)


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments  # a call that went wrong, or another language
    return parsed if isinstance(parsed, dict) else arguments


def _unparsed(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments


def unused_characters(text: str) -> str:
    """Two of the 32 characters that Unicode keeps for a program's internal use."""
    return "".join(c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in text)[:2]


def _mark(value: Any, pattern: re.Pattern[str], replacement: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(replacement, value)
    if isinstance(value, Mapping):
        return {key: _mark(item, pattern, replacement) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(item, pattern, replacement) for item in value]
    return value
