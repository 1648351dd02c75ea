"""What environments of one prompt and one answer share: no tools, no tags, an answer that ends when it ends.

    column(s) of a task ─► cut to so many tokens ─► template, chat template ─► the model's only turn

Each of the family adds its prompt, its rewards and its metrics: `generation`, `translation`, `summarization`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.data.encoding import beginning, encode_prompt
from etude.data.messages import Messages
from etude.data.templates import prompt_segment
from etude.environments.tags import ParsedTurn, TagFraming
from etude.environments.text import TextEnvironment
from etude.errors import DataError, EnvironmentSetupError
from etude.math.counters import word_of
from etude.protocols import Reward, Sampler
from etude.sampling.lengths import LengthRange, Lengths
from etude.types import Episode, Segment

_PROMPTS = word_of("prompt_tokens")  # name of a random stream


class PlainText:
    """No protocol: whatever a model writes is its answer."""

    stop: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()

    def parse(self, text: str) -> ParsedTurn:
        return ParsedTurn()

    def begin(self, tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> TagFraming:
        if not isinstance(prompt, str):
            raise DataError("the prompt is messages, and this environment's prompts are texts; see chat=")
        return TagFraming(
            Segment("prompt", prompt, encode_prompt(tokenizer, prompt)), Segment("environment", "", [])
        )


class SingleTurnEnvironment(TextEnvironment):
    """Abstract: a subclass says `build_prompt`, and perhaps what its rewards and metrics are.

    Args:
        model, tokenizer, prompt, generation_kwargs, max_length: as for `TextEnvironment`. Besides
            end-of-sequence and `max_new_tokens`, `stop_strings` end an answer.
        prompt_tokens: of a task's own text, only the first so many tokens: a number, or a range as for
            `length_sampler`. A range is drawn from by the environment's seed and the text: a task has one
            prompt, in every epoch and for all episodes of a group.
        chat: write the prompt as a user's message, by the tokenizer's chat template. Added tokens in a task's
            text are read as such, as in every prompt.
        rewards, reward_fn, max_seconds, sampler, length_sampler, slots, cache_bytes, seed: as for
            `TextEnvironment`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        prompt: str | None = None,
        prompt_tokens: Lengths | None = None,
        chat: bool = False,
        rewards: Any = None,
        reward_fn: Any = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        length_sampler: Lengths | None = None,
        max_length: int | None = None,
        max_seconds: float | None = None,
        sampler: Sampler | None = None,
        slots: int = 32,
        cache_bytes: int | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            prompt=prompt,
            max_turns=1,
            protocol=PlainText(),
            rewards=rewards,
            reward_fn=reward_fn,
            generation_kwargs=generation_kwargs,
            length_sampler=length_sampler,
            max_length=max_length,
            max_seconds=max_seconds,
            sampler=sampler,
            slots=slots,
            cache_bytes=cache_bytes,
            seed=seed,
        )
        self.prompt_lengths = (
            None if prompt_tokens is None else LengthRange.of(prompt_tokens, "prompt_tokens")
        )
        if chat and not self.tokenizer.chat_template:
            raise EnvironmentSetupError(
                "chat writes a prompt by the tokenizer's chat template, and this one has none; leave it "
                "out, or set tokenizer.chat_template"
            )
        self.chat = chat

    @abstractmethod
    def build_prompt(self, task: Mapping[str, Any]) -> str:
        """The text an episode starts with: `self.written(…)`, with `self.cut(…)` of the task's own in it."""

    def is_done(self, episode: Episode) -> bool:
        return True

    def cut(self, text: str) -> str:
        """The beginning of a task's text that its prompt shows."""
        if self.prompt_lengths is None:
            return text
        return beginning(self.tokenizer, text, self.prompt_lengths.draw(self.seed, _PROMPTS, word_of(text)))

    def written(self, text: str) -> str:
        """A prompt as the model reads it."""
        if not self.chat:
            return self.prompt + text
        return prompt_segment(self.tokenizer, [{"role": "user", "content": self.prompt + text}]).text


def with_metrics(
    rewards: Any,
    reward_fn: Any,
    weights: Mapping[str, float] | None,
    default: Mapping[str, float],
    make: Callable[[str, float], Reward],
) -> list[Any]:
    """An environment's own metrics as rewards, by `make(name, weight)`, and those that it was given.

    Args:
        weights: of metrics; None for the default ones where nothing else scores an episode.
    """
    given = list(rewards) if isinstance(rewards, list | tuple) else [] if rewards is None else [rewards]
    if weights is None:
        weights = {} if given or reward_fn is not None else default
    return [*(make(name, weight) for name, weight in weights.items()), *given]
