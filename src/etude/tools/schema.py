"""From a Python callable to the JSON schema of its arguments.

Where a function is annotated and documented, names, types and descriptions come from
`transformers.utils.get_json_schema`, as chat templates expect them; elsewhere from its signature alone.
What can't be known stays open: a parameter without a usable type has the schema `{}`, which accepts
anything.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from etude.errors import ToolError

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
QUERY = "query"  # the name of a single argument that has none of its own


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model needs to know to call a function, and we to pass its arguments on.

    Attributes:
        description: what the function does; may be empty.
        schema: JSON schema of the arguments, an "object".
        positional: names of the arguments that can only be passed by position, in order.
    """

    description: str
    schema: dict[str, Any]
    positional: tuple[str, ...]


def signature_of(function: Callable[..., Any]) -> Signature:
    """Describe a function, method or callable instance.

    A callable that tells nothing about its parameters (some builtins, `__call__(*args, **kwargs)`) takes
    one string, by position.
    """
    parameters = _parameters(function)
    named = [p for p in parameters if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    any_name = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    any_position = any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
    # Only by position means always given: leaving one out would shift those behind it.
    positional = [p.name for p in named if p.kind is Parameter.POSITIONAL_ONLY]
    required = [p.name for p in named if p.default is Parameter.empty or p.name in positional]
    properties = {p.name: _basic_schema(p.annotation) for p in named}
    if any_position and all(p.kind is Parameter.KEYWORD_ONLY for p in named):
        positional = [QUERY]
        properties = {QUERY: {"type": "string"}, **properties}
        required += [] if any_name else [QUERY]

    description, documented = _documentation(function, named)
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {**properties, **documented},
        "required": required,
    }
    if any_name:
        schema["additionalProperties"] = True
    return Signature(description, schema, tuple(positional))


def is_instance(function: Callable[..., Any]) -> bool:
    """True for an object of a class with `__call__`; False for functions, methods and partials."""
    return not (hasattr(function, "__name__") or isinstance(function, functools.partial))


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    try:
        try:
            signature = inspect.signature(function, eval_str=True)
        except NameError:  # annotations that exist for the type checker only
            signature = inspect.signature(function)
    except ValueError:  # a builtin without a signature
        return [Parameter("args", Parameter.VAR_POSITIONAL)]
    # What a partial has fixed is not the model's to change.
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    return [p for p in signature.parameters.values() if p.name not in fixed]


def _basic_schema(annotation: Any) -> dict[str, Any]:
    known = isinstance(annotation, type) and annotation in JSON_TYPES
    return {"type": JSON_TYPES[annotation]} if known else {}


def _documentation(function: Callable[..., Any], named: list[Parameter]) -> tuple[str, Mapping[str, Any]]:
    """The description, and the documented parameters' schemas if there is one for each of `named`."""
    call = function.__call__ if is_instance(function) else function  # type: ignore[operator]
    # Not `inspect.getdoc`: for a `__call__` without documentation it says "Call self as a function."
    text = inspect.cleandoc((call.func if isinstance(call, functools.partial) else call).__doc__ or "")
    if is_instance(function):
        own = getattr(function, "description", None)
        description = own if isinstance(own, str) else text or inspect.getdoc(type(function)) or ""
    else:
        description = text
    description = description.split("\n\n")[0].strip()
    annotated = all(p.annotation is not Parameter.empty for p in named)
    if not named or not annotated or "Args:" not in text or isinstance(function, functools.partial):
        return description, {}

    # Here and not above: this import takes a second, and reading a type imports torch.
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        documented = get_json_schema(call)["function"]
    except (DocstringParsingException, TypeHintParsingException, NameError):
        return description, {}
    except ValueError as error:
        raise ToolError(
            f"the docstring of {call.__qualname__} has choices that are not JSON; "
            f'expected (choices: ["one", "two"])'
        ) from error
    names = {p.name for p in named}
    properties = {k: v for k, v in documented["parameters"]["properties"].items() if k in names}
    return (description if is_instance(function) else documented["description"]), properties
