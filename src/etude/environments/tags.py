"""Tool-call protocols: how a turn's text says what the model wants.

A protocol reads control out of a model's own text (`parse`) and frames what tools answer (`frame`). It
never sees tool text, which is data. The tags are those of TRL 0.7.4:

    <request><Tool>query<call>response<response> … <submit>
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """What a turn's text asks for.

    Attributes:
        submitted: the model handed in its answer.
        calls: the turn calls a tool.
        tool, query: of the call; None where the call is malformed.
    """

    submitted: bool = False
    calls: bool = False
    tool: str | None = None
    query: str | None = None


class ToolProtocol(Protocol):
    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn."""
        ...

    def parse(self, text: str) -> ParsedTurn: ...

    def frame(self) -> tuple[str, str]:
        """Control text before and after a tool's response."""
        ...


@dataclass(frozen=True, slots=True)
class TagProtocol:
    """TRL 0.7.4's tags."""

    request: str = "<request>"
    call: str = "<call>"
    response: str = "<response>"
    submit: str = "<submit>"

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.call, self.submit)

    def parse(self, text: str) -> ParsedTurn:
        if self.submit in text:
            return ParsedTurn(submitted=True)
        if self.request not in text or self.call not in text:
            return ParsedTurn()
        found = re.search(f"{re.escape(self.request)}(.*?){re.escape(self.call)}", text, re.DOTALL)
        inside = found.group(1) if found else ""
        tag = re.search(r"<(.*?)>", inside, re.DOTALL)
        if tag is None:
            return ParsedTurn(calls=True)
        return ParsedTurn(calls=True, tool=tag.group(1), query=inside[inside.index(">") + 1 :])

    def frame(self) -> tuple[str, str]:
        return "", self.response
