"""Conversations: a model under its own chat template, with tools in its own format, over several turns.

    messages ─► model turn ─► calls tools? ─► their answers ─► model turn ─► …
                                   └► no: the user's reply ─► model turn ─► …, or the end

The end of sequence ends a turn here. One that calls tools goes on with their answers, one that doesn't with
the user's reply, and where there is no user it ends the episode. What the template writes in between is
appended, so that sessions read only what is new, and losses see as sampled what was sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.data.messages import Messages, task_messages
from etude.environments.chat_protocol import ChatProtocol, Rewrites
from etude.environments.model_user import ModelUser
from etude.environments.text import TextEnvironment
from etude.environments.user import User
from etude.errors import EnvironmentSetupError


class ChatEnvironment(TextEnvironment):
    """Plays conversations under the model's chat template.

    A task is a row with `messages`, or with a `prompt` of messages or text, which is a user's; a conversation
    whose last message is the assistant's goes on in that. Rewards get conversations as messages where the
    task's prompt is messages: `prompts`, and `completions` with a message per turn of the model.

    Args:
        model, tokenizer: as `TextEnvironment` takes them; the tokenizer has a chat template.
        tools: what the template shows the model, and what it may call. A turn may call several.
        system: a system message for conversations that begin without one.
        user: who answers a turn that calls no tool, as `TextEnvironment` takes it; a `ModelUser`, or a
            mapping of what `ModelUser.load` takes ({"model": a place, "system": who it is}).
        template_kwargs: what the template takes besides messages and tools (`enable_thinking`).
        rewrites: what to do about a template that shows earlier turns otherwise once a conversation goes on
            (Qwen3's drops thoughts): "refuse" it, before anything is played, or "keep" what the model has
            read and said as it was.
        options: of `TextEnvironment`: `rewards`, `max_turns`, `max_length`, `generation_kwargs`, …

    Raises:
        DataError: the tokenizer has no chat template.
        EnvironmentSetupError: a `prompt` is given, which conversations have no place for.
        TemplateError: what is asked for can't be played with this template.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tools: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        system: str | None = None,
        user: User | Sequence[str] | Mapping[str, Any] | str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        rewrites: Rewrites = "refuse",
        **options: Any,
    ) -> None:
        if tokenizer is None:
            raise EnvironmentSetupError("ChatEnvironment needs the model's tokenizer, with its chat template")
        protocol = ChatProtocol(tokenizer, tools, template_kwargs=template_kwargs, rewrites=rewrites)
        if isinstance(user, Mapping):
            user = ModelUser.load(**user)
        super().__init__(model, tokenizer, tools, protocol=protocol, user=user, **options)
        if self.prompt:
            raise EnvironmentSetupError("a conversation has no prompt before its messages; use system=")
        self.system = system
        protocol.check(user=self.user is not None, turns=self.max_turns, system=system is not None)

    def build_prompt(self, task: Mapping[str, Any]) -> Messages:
        """The conversation that an episode starts with."""
        messages = task_messages(task)
        if self.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages
