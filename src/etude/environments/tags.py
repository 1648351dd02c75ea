"""Tool-call protocols: how a turn's text says what the model wants, and how it is told what came of it.

A protocol reads control out of a model's own text (`parse`) and puts control text around what comes back
(`Framing.frame`). What comes back is data; it is never read for control. The tags are those of TRL 0.7.4:

    <request><Tool>query<call>response<response> … <submit>

Not covered: chat templates (`chat_protocol`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from etude.data.encoding import encode_control, encode_prompt
from etude.data.messages import Messages
from etude.errors import DataError
from etude.types import Segment, Source


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool, as the model wrote it.

    Attributes:
        tool: its name; None where the call is malformed.
        arguments: by name, or the tag protocol's single query; of a malformed call its text.
        id: what the model calls the call, where its format has that.
    """

    tool: str | None
    arguments: str | Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """What a turn's text asks for.

    Attributes:
        submitted: the model handed in its answer.
        calls: of tools, in order.
    """

    submitted: bool = False
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes back to the model after its turn.

    Attributes:
        text, token_ids: data, encoded as such.
        call: which it answers; None where a user speaks.
    """

    text: str
    token_ids: list[int]
    call: Call | None = None


class Framing(Protocol):
    """The control text of one episode, as it goes on."""

    @property
    def prompt(self) -> Segment:
        """What the episode begins with."""
        ...

    def frame(self, replies: Sequence[Reply], ended_by: int | None) -> list[Segment]:
        """What the model reads after its turn: the replies, and the control text that goes with them.

        Args:
            replies: one for each call of the turn, or a user's.
            ended_by: the end-of-sequence token that the turn ended in; None if there is none.
        """
        ...


class ToolProtocol(Protocol):
    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn, besides the tokenizer's end of sequence."""
        ...

    def parse(self, text: str) -> ParsedTurn: ...

    def begin(self, tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> Framing: ...


@dataclass(frozen=True, slots=True)
class TagProtocol:
    """TRL 0.7.4's tags. What comes back, from a tool or a user, is followed by `response`."""

    request: str = "<request>"
    call: str = "<call>"
    response: str = "<response>"
    submit: str = "<submit>"

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.call, self.submit)

    @property
    def end_ids(self) -> tuple[int, ...]:
        return ()

    def parse(self, text: str) -> ParsedTurn:
        if self.submit in text:
            return ParsedTurn(submitted=True)
        if self.request not in text or self.call not in text:
            return ParsedTurn()
        found = re.search(f"{re.escape(self.request)}(.*?){re.escape(self.call)}", text, re.DOTALL)
        inside = found.group(1) if found else ""
        tag = re.search(r"<(.*?)>", inside, re.DOTALL)
        if tag is None:
            return ParsedTurn(calls=(Call(None, text),))
        return ParsedTurn(calls=(Call(tag.group(1), inside[inside.index(">") + 1 :]),))

    def begin(self, tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> TagFraming:
        """Raises `DataError` for messages, which are a chat template's."""
        if not isinstance(prompt, str):
            raise DataError("the prompt is messages, which tags can't render; use a ChatEnvironment")
        return TagFraming(
            Segment("prompt", prompt, encode_prompt(tokenizer, prompt)),
            Segment("environment", self.response, encode_control(tokenizer, self.response)),
        )


@dataclass(frozen=True, slots=True)
class TagFraming:
    """Attributes: after: what follows each reply."""

    prompt: Segment
    after: Segment

    def frame(self, replies: Sequence[Reply], ended_by: int | None) -> list[Segment]:
        segments = []
        for reply in replies:
            source: Source = "environment" if reply.call is None else "tool"
            segments += [Segment(source, reply.text, reply.token_ids), replace(self.after)]
        return segments
