"""A chat template with its tools: what it renders, and what that says about it.

Facts are found by rendering small conversations, with words that no template writes by itself.

Not covered: how calls are read (`call_format`), what comes back to a model (`chat_framing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from etude.data.encoding import control_tokens, special_tokens
from etude.data.messages import Messages
from etude.data.rendering import Rendering
from etude.data.templates import prompt_segment
from etude.errors import TemplateError
from etude.protocols import Tool
from etude.types import Segment

ASK: Mapping[str, Any] = {"role": "user", "content": "Go on."}  # what probes begin with
WORD = "zqword"


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tools: what it shows the model, by name.
        template_kwargs: what it takes besides messages and tools.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Mapping[str, Tool],
        template_kwargs: Mapping[str, Any],
    ) -> None:
        self.tokenizer = tokenizer
        self.tools = tools
        self.template_kwargs = template_kwargs
        self.schemas: list[dict[Any, Any] | Callable[..., Any]] = [_schema(tool) for tool in tools.values()]

    def render(self, messages: Messages) -> Rendering:
        """Raises `DataError` and `TemplateError` as `Rendering.of` does."""
        return Rendering.of(self.tokenizer, messages, self.schemas or None, self.template_kwargs)

    def prompt(self, messages: Messages) -> Segment:
        """Messages to the header that asks for an answer, or in the middle of it, if it has begun."""
        return prompt_segment(self.tokenizer, messages, self.schemas or None, self.template_kwargs)

    def said(self, **turn: Any) -> str:
        """A conversation that ends in such a turn of the model; "" if the template fails on it."""
        try:
            return self.render([ASK, {"role": "assistant", "content": "", **turn}]).text(2)
        except TemplateError:
            return ""

    @cached_property
    def header(self) -> str:
        """A conversation up to the model's turn."""
        return self.render([ASK]).text(1, add_generation_prompt=True)

    @cached_property
    def markers(self) -> list[str]:
        """Control tokens that may end a turn, longest first: special ones, and what ends a turn of words."""
        special = special_tokens(self.tokenizer)
        after = self.said(content=WORD).rpartition(WORD)[2].strip()
        found = [token for token in control_tokens(self.tokenizer).values() if token == after]
        return sorted({*special, *found}, key=len, reverse=True)

    @cached_property
    def takes_system(self) -> bool:
        try:
            return WORD in self.render([{"role": "system", "content": WORD}, ASK]).text(2)
        except TemplateError:
            return False

    @cached_property
    def shows_calls(self) -> int | None:
        """How many calls of a turn it shows: none, one, or all (None)."""
        for count in (2, 1):
            calls = [call_message(WORD, {}, f"zqcall00{n}") for n in range(count)]
            if self.said(tool_calls=calls).count(WORD) == count:
                return None if count > 1 else count
        return 0

    @cached_property
    def tells_tools(self) -> bool:
        """It shows what a tool says otherwise than what the model says; templates without tools may not."""
        turn = {"role": "assistant", "content": "So."}
        texts = set()
        for role in ("tool", "assistant"):
            try:
                texts.add(self.render([ASK, turn, {"role": role, "content": WORD}]).text(3))
            except TemplateError:  # it has no such message here
                return True
        return len(texts) == 2

    @cached_property
    def shows_thoughts(self) -> bool:
        return WORD in self.said(content="So.", reasoning_content=WORD)


def call_message(name: str, arguments: Mapping[str, Any], id: str) -> dict[str, Any]:
    """A call as messages have it. Mistral's ids have nine characters."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How far two texts, or lists of tokens, are the same."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def first_of(tokens: Sequence[str], text: str) -> str | None:
    """The token that a text begins with."""
    return next((token for token in tokens if text.startswith(token)), None)


def last_of(tokens: Sequence[str], text: str) -> str | None:
    """The token that a text ends in."""
    return next((token for token in tokens if text.endswith(token)), None)


def _schema(tool: Tool) -> dict[str, Any]:
    """A tool as templates show it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.schema)}
    return {"type": "function", "function": function}
