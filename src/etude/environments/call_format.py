"""How a chat template writes calls of tools, worked out from what it renders, and read back out of a turn.

    object   <tool_call>{"name": NAME, "arguments": {…}}</tool_call>     Qwen, Hermes, Llama, Mistral
    header   function<｜tool▁sep｜>NAME ```json {…} ```                     DeepSeek, gpt-oss
    fields   <tool_call>NAME <arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>
                                                                         GLM, Qwen-Coder, Nemotron

Where a tokenizer has a `response_template`, transformers reads by that. Where a template shows no calls,
Hermes' form is read, which most models know.

What a model writes otherwise than the template would is read as far as it is clear (white space, order of
keys, a missing end); the rest is a malformed call, which is data. What is written within `<think>` calls
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from etude.environments.chat_template import ChatTemplate, call_message, common_length
from etude.environments.tags import Call
from etude.errors import TemplateError
from etude.tools.arguments import from_texts

# What a probe calls: words that no template writes by itself.
_NAME, _KEYS, _VALUES = "zqname", ("zqfirst", "zqsecond"), ("zqone", "zqtwo")
_ARGUMENTS = dict(zip(_KEYS, _VALUES, strict=True))
_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings
_NEXT = re.compile(r"\s*[,;]?\s*(?=\{)")  # between objects of one list


class CallFormat(Protocol):
    def read(self, text: str) -> tuple[Call, ...]:
        """The calls in a turn's text, malformed ones too."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectCalls:
    """Each call is a JSON object.

    Attributes:
        opening: what stands before one; empty where a turn that calls is nothing but the object.
        name, arguments: its keys.
    """

    opening: str = "<tool_call>"
    name: str = "name"
    arguments: str = "arguments"

    def read(self, text: str) -> tuple[Call, ...]:
        if not self.opening:
            # An answer may be JSON, too: it is a call if it names something.
            names = re.match(rf"\s*\{{.*?{re.escape(json.dumps(self.name))}\s*:", text, re.DOTALL)
            return tuple(self._objects(text, 0)[0]) if names else ()
        calls: list[Call] = []
        at = 0
        while found := re.compile(_loose(self.opening)).search(text, at):
            read, at = self._objects(text, found.end())
            calls += read
        return tuple(calls)

    def _objects(self, text: str, start: int) -> tuple[list[Call], int]:
        """One or more objects, and where they end."""
        calls: list[Call] = []
        at = start
        while following := _NEXT.match(text, at):
            decoded = _decode(text, following.end())
            if decoded is None:
                return [*calls, Call(None, text[at:].strip())], len(text)
            value, at = decoded
            calls.append(self._call(value, text[following.end() : at]))
        return calls or [Call(None, text[start:].strip())], max(at, start)

    def _call(self, value: Any, text: str) -> Call:
        name, arguments = value.get(self.name), value.get(self.arguments, {})
        if isinstance(name, str) and isinstance(arguments, dict | str):
            id = value.get("id")
            return Call(name, arguments, id if isinstance(id, str) else None)
        return Call(None, text)


@dataclass(frozen=True, slots=True)
class HeaderCalls:
    """A name, then its arguments as a JSON object.

    Attributes:
        opening, middle: what stands before the name, and between the two.
    """

    opening: str
    middle: str

    def read(self, text: str) -> tuple[Call, ...]:
        calls: list[Call] = []
        named = re.compile(rf"\s*(\S+?)\s*{_loose(self.middle)}\s*")
        at = 0
        while found := re.compile(_loose(self.opening)).search(text, at):
            at = found.end()
            name = named.match(text, at)
            decoded = _decode(text, name.end()) if name else None
            if name is None or decoded is None:
                calls.append(Call(None, text[at:].strip()))
                continue
            arguments, at = decoded
            calls.append(Call(name.group(1), arguments))
        return tuple(calls)


@dataclass(frozen=True, slots=True)
class FieldCalls:
    """A name, then each argument by itself, whose value is text.

    Attributes:
        opening, named: what stands before and after the name.
        key, value, end: before a key, between it and its value, after the value.
        closing: after the last one.
        schemas: of the tools, by name: they say what type a value is.
    """

    opening: str
    named: str
    key: str
    value: str
    end: str
    closing: str
    schemas: Mapping[str, Mapping[str, Any]]

    def read(self, text: str) -> tuple[Call, ...]:
        whole = re.compile(rf"\s*([^\s<>]+){_exact(self.named)}(.*?)(?:{_exact(self.closing)}|\Z)", re.DOTALL)
        field = re.compile(f"{_exact(self.key)}(.*?){_exact(self.value)}(.*?){_exact(self.end)}", re.DOTALL)
        calls: list[Call] = []
        at = 0
        while found := re.compile(_loose(self.opening)).search(text, at):
            call = whole.match(text, found.end())
            if call is None:
                return (*calls, Call(None, text[found.end() :].strip()))
            name, at = call.group(1), call.end()
            arguments = {key.strip(): value for key, value in field.findall(call.group(2))}
            calls.append(Call(name, from_texts(arguments, self.schemas.get(name, {}))))
        return tuple(calls)


@dataclass(frozen=True, slots=True)
class SpokenCalls:
    """Calls outside of thoughts: what a model considers, it doesn't call.

    Attributes:
        written: how they are.
        thinking: the header has begun a thought.
    """

    written: CallFormat
    thinking: bool

    def read(self, text: str) -> tuple[Call, ...]:
        return self.written.read(spoken("<think>" * self.thinking + text))


@dataclass(frozen=True, slots=True)
class ResponseTemplate:
    """What transformers makes of a turn, by the tokenizer's `response_template`."""

    template: ChatTemplate

    def read(self, text: str) -> tuple[Call, ...]:
        template = self.template
        try:
            message = template.tokenizer.parse_response(text, prefix=template.header, tools=template.schemas)
            called = [call["function"] for call in message.get("tool_calls", ())]
            return tuple(Call(call["name"], call["arguments"]) for call in called)
        except (ValueError, KeyError, TypeError):  # the boundary: what a model wrote is no such message
            return (Call(None, text),)


def call_format(template: ChatTemplate) -> CallFormat:
    """How a template writes calls.

    Raises:
        TemplateError: in a way that can't be read back.
    """
    if getattr(template.tokenizer, "response_template", None) is not None:
        return ResponseTemplate(template)
    found = ObjectCalls() if template.shows_calls == 0 else _written(template)
    return SpokenCalls(found, thinking=template.header.rstrip().endswith("<think>"))


def spoken(text: str) -> str:
    """What a turn says besides its thoughts; one that doesn't end says nothing."""
    before, ended, after = text.partition("</think>")
    if ended and "<think>" not in before:  # the header has begun it
        text = after
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)


def _written(template: ChatTemplate) -> CallFormat:
    def calls(count: int, arguments: Mapping[str, str] = _ARGUMENTS) -> str:
        text = template.said(
            tool_calls=[call_message(_NAME, arguments, f"zqcall00{n}") for n in range(count)]
        )
        return text if text.count(_NAME) == count else ""

    # What comes before and after words does so for calls: the conversation, an empty thought; an end of turn.
    before, _, ending = template.said(content=_NAME).partition(_NAME)
    call, several = calls(1).removesuffix(ending), calls(2)
    call = call[common_length(before, call) :]
    between = several.split(_NAME)[1].rpartition(_VALUES[1])[2] if several else ""
    found = _as_object(call, between) or _as_header(call, between)
    if found is not None:
        return found
    if (fields := _as_fields(call, between, calls(1, {}).removesuffix(ending), template)) is not None:
        return fields
    raise TemplateError(
        f"the chat template writes a call as {call[:200]!r}, where name and arguments can't be told apart; "
        "set `tokenizer.response_template`, by which transformers reads them"
    )


def _as_object(call: str, between: str) -> ObjectCalls | None:
    for brace in re.finditer(r"\{", call[: call.index(_NAME)]):
        decoded = _decode(call, brace.start())
        if decoded is None:
            continue
        keys = {_role_of(value): key for key, value in decoded[0].items()}
        if keys.keys() >= {"name", "arguments"}:
            opening = call[: brace.start()].strip()
            separator = between[: between.rfind("{")]
            return ObjectCalls(_common_end(opening, separator) or opening, keys["name"], keys["arguments"])
    return None


def _role_of(value: Any) -> str:
    if value == _NAME:
        return "name"
    return "arguments" if value in (_ARGUMENTS, json.dumps(_ARGUMENTS)) else ""


def _as_header(call: str, between: str) -> HeaderCalls | None:
    opening, _, rest = call.partition(_NAME)
    for brace in re.finditer(r"\{", rest):
        decoded = _decode(rest, brace.start())
        if decoded is not None and decoded[0] == _ARGUMENTS:
            return HeaderCalls(
                _common_end(opening, between) or opening.strip(), rest[: brace.start()].strip()
            )
    return None


def _as_fields(call: str, between: str, bare: str, template: ChatTemplate) -> FieldCalls | None:
    """`bare` is a call without arguments: it shows where the name ends, and what ends the call."""
    parts = re.split("|".join((_NAME, *_KEYS, *_VALUES)), call)
    if len(parts) != 6 or _NAME not in bare:
        return None
    opening, first_key, value, next_key, _, last = parts
    rest = bare.partition(_NAME)[2]
    named = re.sub(r"<[^>]*$", "", first_key[: common_length(first_key, rest)])
    key = first_key[len(named) :]
    if not key:
        return None  # code: how a value is written depends on its type
    return FieldCalls(
        opening=_common_end(opening, between) or opening.strip(),
        named=named,
        key=key,
        value=value,
        end=next_key.removesuffix(key),
        closing=re.sub(r"^[^<]*>", "", _common_end(last, rest)),
        schemas={name: tool.schema for name, tool in template.tools.items()},
    )


def _common_end(first: str, second: str) -> str:
    return first[len(first) - common_length(first[::-1], second[::-1]) :].strip()


def _loose(literal: str) -> str:
    """A pattern for the literal with any white space, or none, where it has some."""
    return r"\s*".join(map(re.escape, literal.split()))


def _exact(literal: str) -> str:
    """The same, where what is next to it counts: each white space may be missing, no other may be there."""
    return "".join(re.escape(c) + "?" * c.isspace() for c in literal)


def _decode(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object that starts there, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):  # not JSON, or nested beyond reading
        return None
    return (value, end) if isinstance(value, dict) else None
