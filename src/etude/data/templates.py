"""Chat templates ⇄ token deltas: conversations as segments, turn by turn.

A turn of the model is trained on as it would be sampled: after what the template shows the model when it
asks for the turn. Many templates rewrite earlier turns once a conversation goes on (they drop their
reasoning), and then no single text holds all turns like that: `conversation_rows` gives as many as it takes.

Not covered: which token means what (`rendering`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from etude.data.messages import Messages
from etude.data.rendering import Rendering, Turn
from etude.types import Segment, Source

_TOOL_ROLES = frozenset({"tool", "ipython", "function"})


def conversation_segments(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: list[Any] | None = None,
    *,
    add_generation_prompt: bool = False,
    target_from: int = 0,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Segment]:
    """Cut a conversation into segments: each assistant message is one, with its end-of-turn marker.

    The header that opens an assistant message (the generation prompt) belongs to the segment before it; so
    does the white space after an end-of-turn marker, which no model samples. What lies between assistant
    messages is one segment: source "tool" where a tool speaks in it, else "environment".

    Args:
        messages: the conversation; the first message is not an assistant's.
        tools: passed to the template.
        add_generation_prompt: end with the header of the next assistant message.
        target_from: assistant messages at this position and later are targets; earlier ones are the prompt's.
        template_kwargs: passed to the template.

    Raises:
        DataError: the tokenizer has no chat template, or a message isn't one.
        TemplateError: the template fails, or rewrites a turn when the conversation goes on.
    """
    rendering = Rendering.of(tokenizer, messages, tools, template_kwargs)
    turns = _turns(rendering, target_from)
    whole = rendering.text(len(messages), add_generation_prompt)
    for position, turn in turns.items():
        if not turn.within(whole):
            raise rendering.rewritten(turn.text, whole, position)
    return _cut(rendering, whole, turns, len(messages))


def conversation_rows(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: list[Any] | None = None,
    *,
    target_from: int = 0,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[Segment]]:
    """The same in as few rows as hold each turn once, as it would be sampled.

    One row, where the template leaves earlier turns as they were. Else the last row holds the whole
    conversation and those of its turns that are in it as they were sampled; the turns before them are in rows
    of their own, which end where the last of them ends.
    """
    rendering = Rendering.of(tokenizer, messages, tools, template_kwargs)
    turns = _turns(rendering, target_from)
    whole, count = rendering.text(len(messages)), len(messages)
    rows = [] if turns else [_cut(rendering, whole, {}, count)]
    while turns:
        last = max(turns)
        if not turns[last].within(whole):
            whole, count = turns[last].text, last + 1
        held = {position: turn for position, turn in turns.items() if turn.within(whole)}
        rows.insert(0, _cut(rendering, whole, held, count))
        turns = {position: turn for position, turn in turns.items() if position not in held}
    return rows


def prompt_segment(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: list[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Segment:
    """Messages as a prompt: to the header that asks for an answer, or in the middle of it, if it has begun.

    Raises:
        DataError, TemplateError: as `conversation_segments`.
    """
    rendering = Rendering.of(tokenizer, messages, tools, template_kwargs)
    begun = messages[-1]["role"] == "assistant"
    text = rendering.opened() if begun else rendering.text(len(messages), add_generation_prompt=True)
    return rendering.segment("prompt", text)


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
    rendering = Rendering.of(tokenizer, [*messages, *replies], tools)
    whole = rendering.text(len(messages) + len(replies), add_generation_prompt=True)
    before = rendering.text(len(messages))
    if not whole.startswith(before):
        raise rendering.rewritten(before, whole, len(messages) - 1)
    start = rendering.turn_end(whole, 0, len(before))
    return rendering.segment(_source(replies, later=True), whole, start)


def whole_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: list[Any] | None = None,
    *,
    target_from: int = 0,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Segment]:
    """A conversation as one text, imitated whole: after the header that follows `target_from` messages."""
    rendering = Rendering.of(tokenizer, messages, tools, template_kwargs)
    whole = rendering.text(len(messages))
    asked = rendering.text(target_from, add_generation_prompt=True) if target_from else ""
    if not whole.startswith(asked):
        raise rendering.rewritten(asked, whole, target_from - 1, header=True)
    if not asked:
        return [rendering.segment("prompt", whole, target=True)]
    rest = rendering.segment("model", whole, len(asked), target=True)
    return [rendering.segment("prompt", asked), rest]


def _turns(rendering: Rendering, target_from: int) -> dict[int, Turn]:
    """What the model says, by message."""
    found = {
        position: rendering.turn(position)
        for position, message in enumerate(rendering.messages)
        if message["role"] == "assistant" and position >= target_from
    }
    return {position: turn for position, turn in found.items() if turn is not None}


def _cut(rendering: Rendering, whole: str, turns: Mapping[int, Turn], count: int) -> list[Segment]:
    """`whole`, the text of the first `count` messages, with these turns as segments of their own."""
    ends: list[tuple[Source, int, bool]] = []  # source, end in `whole`, target
    first = 0  # message after the last turn's
    for position, turn in turns.items():
        source = _source(rendering.messages[first:position], later=first > 0)
        for start, end in turn.spans:
            ends += [(source, start, False), ("model", end, True)]
            source = "environment"  # what the template writes within a turn
        first = position + 1
    ends.append((_source(rendering.messages[first:count], later=first > 0), len(whole), False))

    segments: list[Segment] = []
    at = 0
    for source, end, target in ends:
        if end > at:
            segments.append(rendering.segment(source, whole, at, end, target=target))
        at = end
    return segments


def _source(messages: Messages, *, later: bool) -> Source:
    if not later:
        return "prompt"
    return "tool" if any(m["role"] in _TOOL_ROLES for m in messages) else "environment"
