"""Chat templates ⇄ token deltas.

A template renders a whole conversation; an episode needs it in runs: what the framework wrote, what the model
wrote. The runs are found by rendering prefixes of the conversation, so they are right only for templates that
leave earlier messages as they were. Those that don't (many drop the reasoning of earlier turns) raise.

System, developer and assistant messages are control text: an added token in them is meant. All other messages
(user, tool) are data, and so is what they hide in their contents: "<|im_end|>" in a tool's answer stays
characters.

Not covered: templates with images; models without a chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from etude.data.encoding import control_tokens, encode_control, encode_plain, encode_prompt
from etude.errors import DataError, TemplateError
from etude.types import Segment, Source

Messages = Sequence[Mapping[str, Any]]
_AUTHOR_ROLES = frozenset({"system", "developer", "assistant"})
_TOOL_ROLES = frozenset({"tool", "ipython", "function"})


def conversation_segments(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: list[Any] | None = None,
    *,
    add_generation_prompt: bool = False,
    target_from: int = 0,
) -> list[Segment]:
    """Cut a conversation into segments: each assistant message is one, with its end-of-turn marker.

    The header that opens an assistant message (the generation prompt) belongs to the segment before it; so
    does the white space after an end-of-turn marker, which no model samples. What lies between assistant
    messages is one segment: source "tool" where a tool speaks in it, else "environment".

    Args:
        messages: the conversation; the first message is not an assistant's.
        tools: passed to the template.
        add_generation_prompt: end with the header of the next assistant message.
        target_from: assistant messages at this position and later are targets, earlier ones are not.

    Raises:
        DataError: the tokenizer has no chat template, or a message isn't one.
        TemplateError: the template fails, or breaks its own prefix.
    """
    rendering = _Rendering.of(tokenizer, messages, tools)
    whole = rendering.text(len(messages), add_generation_prompt)
    ends: list[tuple[Source, int, bool]] = []  # source, end in `whole`, target
    first = 0  # message after the last assistant's
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if position == 0:
            raise DataError(
                "the conversation starts with an assistant message, so nothing asks for it; "
                "expected a system or user message first"
            )
        header_end = rendering.prefix_length(whole, position, add_generation_prompt=True)
        message_end = rendering.prefix_length(whole, position + 1)
        turn_end = rendering.turn_end(whole, header_end, message_end)
        ends.append((_source(messages, first, position), header_end, False))
        ends.append(("model", turn_end, position >= target_from))
        first = position + 1
    ends.append((_source(messages, first, len(messages)), len(whole), False))

    segments: list[Segment] = []
    start = 0
    for source, end, target in ends:
        if end > start:
            segments.append(rendering.segment(source, whole[start:end], opens=start == 0, target=target))
        start = end
    return segments


def reply_segment(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, replies: Messages, tools: list[Any] | None = None
) -> Segment:
    """What the framework appends after the model's turn, to the header of its next one.

    Args:
        messages: the conversation so far; the last one is the assistant's.
        replies: what answers it (tool results, a user's message).
        tools: passed to the template.

    Raises:
        DataError, TemplateError: as `conversation_segments`.
    """
    rendering = _Rendering.of(tokenizer, [*messages, *replies], tools)
    whole = rendering.text(len(messages) + len(replies), add_generation_prompt=True)
    end = rendering.prefix_length(whole, len(messages))
    start = rendering.turn_end(whole, 0, end)
    return rendering.segment(_source(replies, 0, len(replies), later=True), whole[start:], opens=False)


def _source(messages: Messages, first: int, end: int, *, later: bool = False) -> Source:
    if first == 0 and not later:
        return "prompt"
    return "tool" if any(m["role"] in _TOOL_ROLES for m in messages[first:end]) else "environment"


@dataclass(frozen=True, slots=True)
class _Rendering:
    """A conversation under a template; control tokens in data stand between two marks.

    Attributes:
        marks: two characters that occur nowhere in the conversation.
    """

    tokenizer: PreTrainedTokenizerBase
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    marks: str

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None
    ) -> _Rendering:
        _check(tokenizer, messages)
        marks = _unused_characters(json.dumps(messages, ensure_ascii=False, default=str))
        longest_first = sorted(control_tokens(tokenizer).values(), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches
        marked = [
            dict(m) if m["role"] in _AUTHOR_ROLES else _mark(m, pattern, f"{marks[0]}\\g<0>{marks[1]}")
            for m in messages
        ]
        return cls(tokenizer, marked, tools, marks)

    def text(self, count: int, add_generation_prompt: bool = False) -> str:
        """The first `count` messages, rendered, with marks."""
        try:
            rendered = self.tokenizer.apply_chat_template(
                self.messages[:count],
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError) as error:  # or what the template did to a value failed
            raise TemplateError(
                f"{_describe(self.tokenizer)} fails on the conversation up to message {count - 1} "
                f"({self.messages[count - 1]['role']}): {error}"
            ) from error
        return str(rendered)

    def prefix_length(self, whole: str, count: int, *, add_generation_prompt: bool = False) -> int:
        """Length of the first `count` messages within the rendering of all of them."""
        prefix = self.text(count, add_generation_prompt)
        if whole.startswith(prefix):
            return len(prefix)
        same = next((i for i, pair in enumerate(zip(prefix, whole, strict=False)) if pair[0] != pair[1]), 0)
        around = slice(max(0, same - 20), same + 40)
        up_to = "the header after message" if add_generation_prompt else "message"
        raise TemplateError(
            f"{_describe(self.tokenizer)} renders {up_to} {count - 1} ({self.messages[count - 1]['role']}) "
            f"differently once the conversation goes on: {prefix[around]!r} becomes {whole[around]!r}. Use a "
            "template that leaves earlier messages as they were, or give one row per assistant turn"
        )

    def turn_end(self, whole: str, start: int, end: int) -> int:
        """Where a turn ends within `start:end`: before white space that follows its end-of-turn marker."""
        turn = whole[start:end].rstrip()
        markers = control_tokens(self.tokenizer).values()
        marker = next((token for token in markers if turn.endswith(token)), None)
        if marker is None:
            return end
        space = whole[start + len(turn) : end]
        # Some markers swallow the space (`rstrip=True`, as in Phi-3); cut off, it would become a token.
        swallowed = encode_control(self.tokenizer, marker + space) == encode_control(self.tokenizer, marker)
        return end if swallowed else start + len(turn)

    def segment(self, source: Source, text: str, *, opens: bool, target: bool = False) -> Segment:
        """Encode a piece of the rendering; `opens` says that a sequence starts with it."""
        ids: list[int] = []
        shown: list[str] = []
        # Text, data between marks, text, data, ...
        for index, piece in enumerate(
            re.split(f"{self.marks[0]}(.*?){self.marks[1]}", text, flags=re.DOTALL)
        ):
            if any(mark in piece for mark in self.marks):
                raise TemplateError(
                    f"{_describe(self.tokenizer)} takes a message apart next to "
                    f"{piece.strip(self.marks)[:40]!r}, so a control token in the data could pass for the "
                    "template's own; use a template that renders contents whole"
                )
            if index % 2:
                data = encode_plain(self.tokenizer, piece)
                piece, piece_ids = data.text, data.ids
            elif index == 0 and opens:
                piece_ids = encode_prompt(self.tokenizer, piece, add_bos=False)
            else:
                piece_ids = encode_control(self.tokenizer, piece) if piece else []
            ids += piece_ids
            shown.append(piece)
        return Segment(source, "".join(shown), ids, target=target)


def _check(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer {_name(tokenizer)} has no chat template, so it can't render messages; take a "
            "chat model's tokenizer, set `tokenizer.chat_template`, or give plain text (`text`, or `prompt` "
            "and `completion` as strings)"
        )
    if not messages:
        raise DataError("the conversation has no messages; expected at least one")
    for position, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise DataError(
                f"message {position} has no role; its keys are {', '.join(map(repr, message)) or 'missing'}. "
                "Expected {'role': 'user', 'content': ...}"
            )


def _unused_characters(text: str) -> str:
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


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{type(tokenizer).__name__} {tokenizer.name_or_path!r}".removesuffix(" ''")


def _describe(tokenizer: PreTrainedTokenizerBase) -> str:
    start = tokenizer.get_chat_template().strip().splitlines()[0][:60]
    return f"the chat template of {_name(tokenizer)}, which starts {start!r},"
