"""A model as the user of a conversation.

It has a template, a sampler and a session of its own, and sees the conversation from the other side: what
the policy says are its user's messages, what it says are its own. Tools and thoughts it doesn't see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.data.encoding import control_tokens, encode_plain
from etude.data.messages import task_messages
from etude.environments.call_format import spoken
from etude.environments.chat_protocol import ChatProtocol
from etude.environments.tags import Framing, Reply
from etude.errors import EnvironmentSetupError
from etude.math.counters import mix
from etude.models.loading import load_causal_lm, load_tokenizer
from etude.protocols import Sampler, Session
from etude.sampling.local import LocalSampler
from etude.sampling.params import sampling_params
from etude.types import Episode

_STREAM = 0x75736572  # its tokens come from another stream than the policy's


@dataclass(slots=True)
class _Talk:
    """One conversation, as this side has it.

    Attributes:
        read: tokens in the session.
        ended_by: the token that ended its last turn.
    """

    framing: Framing
    session: Session
    read: int = 0
    ended_by: int | None = None


class ModelUser:
    """A model that answers the policy: `TextEnvironment(…, user=ModelUser(…))`.

    Args:
        model: a causal language model; None where a sampler is given.
        tokenizer: of the model, with its chat template.
        system: who it is and what it wants. `{column}` is replaced by the task's column of that name.
        stop: the phrase by which it says that it has no more to say. The reply that has it isn't given.
        opening: what it reads before the task's first message, which it takes for its own.
        generation_kwargs: as `TextEnvironment` takes them.
        template_kwargs: what its template takes besides messages.
        sampler: to use instead of a local one over `model`.
        slots, cache_bytes: of the local one.
    """

    def __init__(
        self,
        model: nn.Module | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str,
        stop: str | None = "[DONE]",
        opening: str = "Hello, what can I do for you?",
        generation_kwargs: Mapping[str, Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        sampler: Sampler | None = None,
        slots: int = 32,
        cache_bytes: int | str | None = None,
    ) -> None:
        if sampler is None:
            if model is None:
                raise EnvironmentSetupError("this user has no model and no sampler; pass one of them")
            sampler = LocalSampler(model, tokenizer, slots=slots, cache_bytes=cache_bytes)
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.system = system
        self.stop = stop
        self.opening = opening
        # What it says doesn't train, so it may go on from what its template would show otherwise.
        self.protocol = ChatProtocol(tokenizer, template_kwargs=template_kwargs, rewrites="keep")
        self.protocol.check(user=True, turns=2)
        ends = [tokenizer.eos_token_id, *self.protocol.end_ids]
        settings = {"eos_token_id": [i for i in ends if i is not None], **(generation_kwargs or {})}
        self.params = sampling_params(settings, tokenizer)
        self._talks: dict[int, _Talk] = {}

    @classmethod
    def load(cls, model: str | PathLike[str], *, system: str, **settings: Any) -> ModelUser:
        """A user whose model and tokenizer are loaded from a directory or hub id; `settings` as above."""
        loaded = load_causal_lm(
            model, device="cuda" if torch.cuda.is_available() else None, is_trainable=False
        )
        return cls(loaded, load_tokenizer(model), system=system, **settings)

    async def __call__(self, episode: Episode) -> str | None:
        heard = spoken(episode.last_model_text).strip()
        talk = self._talks.get(id(episode))
        if talk is None:
            talk = self._talks[id(episode)] = self._begin(episode, heard)
            new = talk.framing.prompt.token_ids
        else:
            encoded = encode_plain(self.tokenizer, heard)
            came = talk.framing.frame([Reply(encoded.text, encoded.ids)], talk.ended_by)
            new = [token for segment in came for token in segment.token_ids]
        room = self.sampler.max_length - talk.read - len(new)
        if room <= len(self.params.forced_prefix):
            return None
        params = replace(self.params, max_new_tokens=min(self.params.max_new_tokens, room))
        said = await talk.session.sample(new, params)
        talk.read += len(new) + len(said.token_ids)
        talk.ended_by = said.token_ids[-1] if said.finish == "eos" else None
        text = spoken(said.text).strip()
        return None if self.stop is not None and self.stop in text else text

    def close(self, episode: Episode) -> None:
        """The episode is over."""
        talk = self._talks.pop(id(episode), None)
        if talk is not None:
            talk.session.close()

    def _begin(self, episode: Episode, heard: str) -> _Talk:
        task = {name: self._harmless(str(value)) for name, value in episode.task.items()}
        system = self.system.format_map(task) if "{" in self.system else self.system
        messages = [{"role": "system", "content": system}, {"role": "user", "content": self.opening}]
        if not self.protocol.template.takes_system:
            messages = [{"role": "user", "content": f"{system}\n\n{self.opening}"}]
        swapped = {"user": "assistant", "assistant": "user"}
        for message in task_messages(episode.task):
            if message["role"] in swapped and isinstance(message.get("content"), str):
                said = self._harmless(message["content"])
                messages.append({"role": swapped[message["role"]], "content": said})
        framing = self.protocol.begin(self.tokenizer, [*messages, {"role": "user", "content": heard}])
        return _Talk(framing, self.sampler.session(seed=mix(episode.seed, _STREAM)))

    def _harmless(self, text: str) -> str:
        """Data for places where templates take control text: control tokens in it are taken apart."""
        for token in control_tokens(self.tokenizer).values():
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text
