"""What a model reads after its turn in a chat: tools' answers or a user's message, as its template has them.

    <|im_start|>user …<|im_end|> <|im_start|>assistant  <tool_call>…<|im_end|>  <|im_start|>user …
    └──────────────────── prompt ───────────────────┘  └──────── model ──────┘  └───── frame ─────

The frame is found by rendering: a word that occurs nowhere else stands in for the model's turn, and what the
template puts after it, up to the header of the next turn, is what the model reads. What it has read and said
is never rendered again. So a template that later shows that otherwise ("rewrites" it) is noticed and refused.
Whether it does is asked of the conversation's shape: how a model words its turns decides nothing.

Contents of users and tools are data: control tokens in them stay characters (`data.rendering`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from etude.data.encoding import control_tokens, decode
from etude.data.messages import Messages, unused_characters
from etude.data.rendering import Rendering
from etude.environments.chat_template import ChatTemplate, call_message, common_length, first_of, last_of
from etude.environments.tags import Reply
from etude.errors import TemplateError
from etude.types import Segment, Source

_ADVICE = (
    "So the model would go on from another text than the one it has read. Use a template that leaves earlier "
    "messages as they were, or rewrites='keep', by which the conversation goes on as it was read"
)
_ID = re.compile("[A-Za-z0-9]{9}")  # Mistral's takes no other


@dataclass(frozen=True, slots=True)
class _Frame:
    """A rendering of a conversation that goes on, and where in it.

    Attributes:
        source: who is heard. What they say stands between `marks`.
        whole: the text, with what came and the header that asks for the next turn.
        at: where the model's own words end in it.
        closing: what ends its turn.
        marker: the control token in that, if there is one.
        ends: the same where nothing comes after the turn; gpt-oss' <|return|> then becomes <|end|>.
    """

    rendering: Rendering
    source: Source
    marks: str
    whole: str
    at: int
    closing: str
    marker: str | None
    ends: str | None

    def segments(self, ended: bool) -> list[Segment]:
        """What the model reads next; also the marker of its turn's end, if it hasn't written one.

        The tokens are those of the text in one piece, as the tokenizer has it, so one may reach across a seam
        ("!\n"): then it belongs, with its characters, to what follows the seam.
        """
        start = self.at + len(self.closing)
        if self.marker is not None and not ended:
            start = self.at + self.closing.rindex(self.marker)
        parts = re.split(f"[{self.marks}]", self.whole[start:])  # text, data, text, ...
        whole = self.whole[:start] + "".join(parts)
        ids = self._ids(whole, start, len(whole))
        segments: list[Segment] = []
        end, known, before = start, 0, ""
        for index, part in enumerate(parts):
            end += len(part)
            upto = self._ids(whole, start, end)
            until = common_length(ids, upto)
            text = before + part.translate(dict.fromkeys(map(ord, self.rendering.marks)))
            before = decode(self.rendering.tokenizer, upto[until:])
            text, before = (text.removesuffix(before), before) if text.endswith(before) else (text, "")
            if until > known:
                source = self.source if index % 2 else "environment"
                segments.append(Segment(source, text, ids[known:until]))
                known = until
            else:
                before = text + before
        return segments

    def _ids(self, whole: str, start: int, end: int) -> list[int]:
        return self.rendering.segment("environment", whole, start, end).token_ids


class ChatFraming:
    """One conversation: its messages, then a stand-in for each turn of the model, and what came back.

    Args:
        messages: to the model's first turn, or with the beginning of that.
        strict: refuse a template that rewrites earlier messages.
    """

    def __init__(self, template: ChatTemplate, messages: Messages, strict: bool) -> None:
        self.template = template
        self.strict = strict
        self.prompt = template.prompt(messages)
        self._messages = [dict(message) for message in messages]
        self._begun = ""  # of the turn that comes
        if self._messages[-1]["role"] == "assistant":
            self._begun = str(self._messages.pop().get("content") or "")

    def frame(self, replies: Sequence[Reply], ended_by: int | None) -> list[Segment]:
        """Raises `TemplateError` if the template rewrites earlier messages, or fails on these."""
        frame = self._go_on(replies)
        first, *others = frame.segments(ended_by is not None)
        if frame.marker is None and ended_by is not None and first.token_ids[0] == ended_by:
            # The model has said itself who is next, as GLM's does.
            said = control_tokens(self.template.tokenizer)[ended_by]
            first = replace(first, text=first.text.removeprefix(said), token_ids=first.token_ids[1:])
        return [first, *others]

    def end_of_turn(self, replies: Sequence[Reply]) -> int | None:
        """The token that ends a turn which is answered so; None if the template has no such turn or token."""
        try:
            frame = self._go_on(replies)
        except TemplateError:
            return None
        tokens = control_tokens(self.template.tokenizer)
        if frame.ends is not None:
            return next(index for index, token in tokens.items() if token == frame.ends)
        first = frame.segments(ended=True)[0].token_ids[0]
        return first if first in tokens else None

    def _go_on(self, replies: Sequence[Reply]) -> _Frame:
        template, count = self.template, len(self._messages)
        word = _unused(f"turn{count}words", [*self._messages, *(reply.text for reply in replies)])
        marks = unused_characters(json.dumps([r.text for r in replies], ensure_ascii=False))
        calls, came = self._messages_of(replies, word)
        heard = [{**message, "content": _between(marks, message["content"])} for message in came]
        turn = {"role": "assistant", "content": self._begun + word * (not calls), **calls}
        thought = word.replace("words", "thoughts")
        if template.shows_thoughts:
            turn["reasoning_content"] = thought
        rendering = template.render([*self._messages, turn, *heard])
        asked = rendering.text(count, add_generation_prompt=True)
        if not template.shows_thoughts and (begun := _missing(asked, rendering)):
            # Perhaps the header begins what is the message's own, as DeepSeek-R1's does with a thought.
            begun += f"{thought}\n</think>\n\n" * begun.rstrip().endswith("<think>")
            other = {**turn, "content": begun + turn["content"]}
            again = template.render([*self._messages, other, *heard])
            if not _missing(asked, again):
                turn, rendering = other, again
        if self.strict and _missing(asked, rendering):
            raise rendering.rewritten(asked, _whole(rendering), count - 1, header=True, advice=_ADVICE)
        frame = self._locate(rendering, count, word, marks)
        forgotten = thought in json.dumps(turn) and thought not in frame.whole
        if self.strict and (forgotten or frame.marker != frame.ends):
            raise rendering.rewritten(rendering.text(count + 1), frame.whole, count, advice=_ADVICE)
        self._messages, self._begun = [*self._messages, turn, *came], ""
        return frame

    def _messages_of(
        self, replies: Sequence[Reply], word: str
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A turn's calls, as far as the template shows them, which end in the word; and what comes back."""
        calls: list[dict[str, Any]] = []
        came: list[dict[str, Any]] = []
        for reply in replies:
            if reply.call is None:
                came.append({"role": "user", "content": reply.text})
                continue
            # Control text may have the tool's name: one of ours, not one that the model made up.
            asked = reply.call.tool
            name = asked if asked is not None and asked in self.template.tools else "unknown"
            id = reply.call.id or ""
            id = id if _ID.fullmatch(id) else f"call{len(self._messages) + len(calls):05d}"
            calls.append(call_message(name, {word: word}, id))
            came.append({"role": "tool", "name": name, "tool_call_id": id, "content": reply.text})
        shown = calls[: self.template.shows_calls]
        return ({"tool_calls": shown} if shown else {}), came

    def _locate(self, rendering: Rendering, count: int, word: str, marks: str) -> _Frame:
        """Find the end of the turn that the word stands for, message `count`."""
        last, whole = rendering.text(count + 1), _whole(rendering)
        if word not in last or word not in whole:
            raise rendering.rewritten(last, whole, count, advice="It doesn't show what the model says")
        after, at = last.rindex(word) + len(word), whole.rindex(word) + len(word)
        closing = last[after : rendering.turn_end(last, after, rendering.end_of_message(last, count))]
        ends = marker = last_of(self.template.markers, closing.rstrip())
        if not whole.startswith(closing, at):
            rest = whole[at:]
            marker = first_of(self.template.markers, rest.lstrip())
            closing = rest[: rest.index(marker) + len(marker)] if marker else ""
        spoken = [message for message in rendering.messages[count + 1 :] if message["content"].strip()]
        if whole.count(marks[1], at) < len(spoken):
            raise TemplateError(
                f"the chat template doesn't show what a {spoken[0]['role']} says as it is; it puts "
                f"{whole[at : at + 80]!r} after the model's turn. Use a template that does"
            )
        source: Source = "environment" if rendering.messages[count + 1]["role"] == "user" else "tool"
        return _Frame(rendering, source, marks, whole, at, closing, marker, ends)


def _whole(rendering: Rendering) -> str:
    """All messages, and the header that asks for the next one."""
    return rendering.text(len(rendering.messages), add_generation_prompt=True)


def _missing(asked: str, rendering: Rendering) -> str:
    """The end of what asked for a turn, from where the whole conversation has something else."""
    return asked[common_length(asked, _whole(rendering)) :]


def _between(marks: str, text: str) -> str:
    """The text between marks; white space around it, which templates trim, is outside of them."""
    core = text.strip()
    start = text.index(core)
    return f"{text[:start]}{marks[0]}{core}{marks[1]}{text[start + len(core) :]}" if core else text


def _unused(word: str, texts: Sequence[Any]) -> str:
    """The word, or a longer one, so that it is in none of the texts."""
    while any(word in json.dumps(text, ensure_ascii=False, default=str) for text in texts):
        word += "q"
    return word
