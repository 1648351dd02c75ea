"""A model's own chat template as a protocol: what asks for its turns, how it calls tools, what comes back.

Not covered: templates with images; tools that differ from task to task.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from etude.data.messages import Messages
from etude.environments.call_format import CallFormat, call_format
from etude.environments.chat_framing import ChatFraming
from etude.environments.chat_template import ASK, WORD, ChatTemplate
from etude.environments.tags import Call, Framing, ParsedTurn, Reply
from etude.errors import ConfigError, DataError, TemplateError
from etude.tools.function import tools_by_name

logger = logging.getLogger(__name__)

Rewrites = Literal["refuse", "keep"]


class ChatProtocol:
    """The chat template of a tokenizer.

    Args:
        tokenizer: has the template; if it has a `response_template`, calls are read by that.
        tools: what the template shows the model, as `TextEnvironment` takes them. Without any, nothing that
            the model writes is a call.
        template_kwargs: what the template takes besides messages and tools (`enable_thinking`).
        rewrites: what to do if the template shows earlier turns otherwise once the conversation goes on, as
            many drop the model's thoughts: "refuse" raises an error, "keep" goes on from what the model has
            read and said, as it has read and said it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        rewrites: Rewrites = "refuse",
    ) -> None:
        if rewrites not in ("refuse", "keep"):
            raise ConfigError(f"rewrites is {rewrites!r}; expected refuse or keep")
        self.template = ChatTemplate(tokenizer, tools_by_name(tools), dict(template_kwargs or {}))
        self.rewrites = rewrites

    @property
    def stop(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """What ends a turn in the template: its marker, or, as in GLM's, what hands over to who is next."""
        calls = [None, Call("unknown", {})] if self.template.tools else [None]
        framings = (ChatFraming(self.template, [ASK], strict=False) for _ in calls)
        ends = [f.end_of_turn([Reply("So.", [], call)]) for f, call in zip(framings, calls, strict=True)]
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    @cached_property
    def call_format(self) -> CallFormat:
        return call_format(self.template)

    def parse(self, text: str) -> ParsedTurn:
        return ParsedTurn(calls=self.call_format.read(text) if self.template.tools else ())

    def begin(self, tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> Framing:
        """Raises `DataError` for a text, which has no roles, and what rendering the messages raises."""
        if isinstance(prompt, str):
            raise DataError(
                f"the prompt is a text ({prompt[:40]!r}); a chat template renders messages: use a "
                "ChatEnvironment, or return [{'role': 'user', 'content': ...}] from build_prompt"
            )
        return ChatFraming(self.template, prompt, strict=self.rewrites == "refuse")

    def check(self, *, user: bool, turns: int, system: bool = False) -> None:
        """Go through conversations as they may be played: what a template can't do is known beforehand.

        Args:
            user: turns that call no tool are answered.
            turns: of the model, at most.
            system: conversations begin with a system message.

        Raises:
            TemplateError: it shows earlier messages otherwise as the conversation goes on, or what comes back
                not at all; or its way of calling tools can't be read.
        """
        tools, tokenizer = list(self.template.tools), self.template.tokenizer
        if tools and self.template.shows_calls == 0:
            logger.warning(
                "the chat template shows the model no tools and no calls; describe them in a system message, "
                'as called by <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
            )
        if tools and not self.template.tells_tools:
            raise TemplateError(
                "the chat template shows what a tool says as if the model had said it; take one with tools"
            )
        self.parse("")
        messages = [{"role": "system", "content": "Be brief."}] * system + [ASK]
        self.begin(tokenizer, messages)
        answers = [[Reply(WORD, [], Call(name, {}))] * count for name in tools[:1] for count in (1, 2)]
        for replies in product([*answers, *[[Reply(WORD, [])]] * user], repeat=min(turns - 1, 2)):
            framing = self.begin(tokenizer, messages)
            for reply in replies:
                framing.frame(reply, None)
