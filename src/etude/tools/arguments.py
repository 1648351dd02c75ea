"""What a model passed to a tool, read and checked against the tool's schema.

Checked: required and unknown names, basic JSON types, enumerations. Not covered: the rest of JSON schema
(formats, ranges, nested objects), which is the tool's own business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from etude.errors import ToolError


def read_arguments(arguments: str | Mapping[str, Any], schema: Mapping[str, Any]) -> str | dict[str, Any]:
    """Named arguments that fit the schema.

    A string is the tag protocol's single query. It goes to the one parameter that needs it: the only
    required one, or else the first; where several are needed it must be the text of a JSON object. With
    more than one parameter, text that is a JSON object with known names is read as one.

    Args:
        arguments: the query, or named arguments as JSON has them.
        schema: JSON schema of the arguments. Without "properties" a string passes as it is.

    Raises:
        ToolError: the arguments don't fit; the message is for the model to read.
    """
    if isinstance(arguments, str):
        if "properties" not in schema:
            return arguments
        arguments = _from_query(arguments, schema)
    if not isinstance(arguments, Mapping):
        raise ToolError(f"expected named arguments, got {_short(arguments)}")
    properties, required = schema.get("properties", {}), schema.get("required", ())
    if missing := [name for name in required if name not in arguments]:
        raise ToolError(f"missing {_names(missing)}; expected {_expected(schema)}")
    unknown = [name for name in arguments if name not in properties]
    if unknown and not schema.get("additionalProperties") and "properties" in schema:
        raise ToolError(f"unknown {_names(unknown)}; expected {_expected(schema)}")
    return {name: _checked(name, value, properties.get(name, {})) for name, value in arguments.items()}


def from_texts(arguments: Mapping[str, str], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Named arguments that a model wrote as text, each as the type that the schema asks for.

    What can't be read as that stays text, which `read_arguments` then refuses.
    """
    properties = schema.get("properties", {})
    typed: dict[str, Any] = {}
    for name, text in arguments.items():
        try:
            typed[name] = _from_text(name, text, properties.get(name, {}))
        except ToolError:
            typed[name] = text
    return typed


def _from_query(query: str, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties, required = schema["properties"], schema.get("required", ())
    several = len(properties) > 1 or bool(schema.get("additionalProperties"))
    if several:
        named = _json_object(query)
        if named is not None and (len(required) > 1 or not properties or set(named) <= set(properties)):
            return named
    if len(required) > 1 or (several and not properties):
        raise ToolError(f"expected a JSON object with {_expected(schema)}, got {query[:80]!r}")
    if not properties:
        if query.strip():
            raise ToolError(f"expected no arguments, got {query[:80]!r}")
        return {}
    name = required[0] if required else next(iter(properties))
    return {name: _from_text(name, query, properties[name])}


def _json_object(text: str) -> dict[str, Any] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or nested beyond reading
        return None
    return value if isinstance(value, dict) else None


def _types(schema: Mapping[str, Any]) -> list[str]:
    """JSON types that the schema allows; none means anything."""
    if alternatives := schema.get("anyOf"):
        each = [_types(alternative) for alternative in alternatives]
        types = [] if not all(each) else [name for names in each for name in names]
    else:
        types = schema.get("type", [])
        types = [types] if isinstance(types, str) else list(types)
    return [*types, "null"] if types and schema.get("nullable") else types


def _from_text(name: str, text: str, schema: Mapping[str, Any]) -> Any:
    """The text as the type that the schema asks for; strings and anything unknown stay text."""
    types = _types(schema)
    known = [t for t in types if t in _READERS]
    if "string" in types or not known:
        return text
    for kind in known:
        try:
            return _READERS[kind](text.strip())
        except (ValueError, KeyError, RecursionError):  # not of this type; perhaps of the next
            continue
    raise ToolError(f"{name!r} is {text[:80]!r}; expected {' or '.join(types)}")


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_READERS: dict[str, Callable[[str], Any]] = {  # from text; each raises ValueError or KeyError
    "integer": int,  # accepts leading zeros
    "number": float,
    "boolean": lambda text: _BOOLEANS[text.lower()],
    "array": json.loads,
    "object": json.loads,
}
_CHECKS: dict[str, Callable[[Any], bool]] = {  # of a value as JSON has it; a bool is no number
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: not isinstance(value, bool) and isinstance(value, int),
    "number": lambda value: not isinstance(value, bool) and isinstance(value, int | float),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list | tuple),
    "object": lambda value: isinstance(value, Mapping),
    "null": lambda value: value is None,
}


def _checked(name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    types = _types(schema)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and "integer" in types:
        value = int(value)  # JSON schema: 3.0 is an integer
    # A type that isn't JSON's ("image", "audio") is the tool's to judge.
    if types and all(t in _CHECKS and not _CHECKS[t](value) for t in types):
        raise ToolError(f"{name!r} is {_short(value)}; expected {' or '.join(types)}")
    choices = schema.get("enum")
    if choices is not None and value not in choices and not (value is None and "null" in types):
        raise ToolError(f"{name!r} is {_short(value)}; expected one of {', '.join(map(repr, choices))}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _names(names: list[str]) -> str:
    return f"argument{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"


def _expected(schema: Mapping[str, Any]) -> str:
    """For the model: `'a' (integer), 'b' (optional)`."""
    required = schema.get("required", ())
    described = []
    for name, parameter in schema.get("properties", {}).items():
        notes = [" or ".join(types)] if (types := _types(parameter)) else []
        notes += [] if name in required else ["optional"]
        described.append(f"{name!r}" + (f" ({', '.join(notes)})" if notes else ""))
    return ", ".join(described) or "no arguments"
