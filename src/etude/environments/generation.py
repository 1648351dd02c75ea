"""Continuations of texts: the model goes on from the beginning of a review, a story, a post.

    env = GenerationEnvironment(model, tokenizer, prompt_tokens=(2, 8), length_sampler=(4, 16),
    rewards=sentiment)

No metric says what a good continuation is, so its rewards are yours: a classifier, a reward model, a
function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.environments.prompts import text_of
from etude.environments.single_turn import SingleTurnEnvironment


class GenerationEnvironment(SingleTurnEnvironment):
    """One continuation of a task's text.

    Args:
        model, tokenizer, options: as for `SingleTurnEnvironment`.
        column: of the text; by default "text", or else "prompt" or "query".
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        column: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.columns = ("text", "prompt", "query") if column is None else (column,)

    def build_prompt(self, task: Mapping[str, Any]) -> str:
        return self.written(self.cut(text_of(task, self.columns)))
