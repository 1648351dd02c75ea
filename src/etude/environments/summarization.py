"""Summarisation: a document, an answer, and how near it comes to a reference without being long or copied.

    env = SummarizationEnvironment(model, tokenizer, document="article", summary="highlights")

Not covered: documents longer than the model reads but by `prompt_tokens`, which keeps their beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.environments.prompts import PromptTemplate, reference_of, text_of
from etude.environments.single_turn import SingleTurnEnvironment, with_metrics
from etude.protocols import Reward
from etude.rewards.metrics import metric_reward
from etude.rewards.summary import corpus_rouge
from etude.types import Episode

TEMPLATES = {"t5": "summarize: {document}", "tldr": "{document}\n\nTL;DR:"}
WEIGHTS = {
    "rouge1": 1 / 3,
    "rouge2": 1 / 3,
    "rougeL": 1 / 3,
    "length_penalty": 0.2,
    "copy_penalty": 0.2,
}


class SummarizationEnvironment(SingleTurnEnvironment):
    """Summarises a task's document, and scores that by a reference, its length and what it copies.

    Args:
        model, tokenizer, options: as for `SingleTurnEnvironment`. `prompt_tokens` cuts a long document, and
            leaves what the template puts around it.
        document, summary: columns of the document and of its reference. A reference is a text or a list of
            them; a task may have none.
        template: the prompt, with {document}; or "t5", "summarize: …", or "tldr", "…\\n\\nTL;DR:", which
            decoders know from the web.
        words, tokens: how long a summary is to be, a number or a pair of a shortest and a longest, in words
            or in sampled tokens; by default as many words as the reference has.
        copied: what counts as copied are so many words in a row.
        reward_weights: metrics by the weights that they have in a reward, beside `rewards`: of ROUGE
            "rouge1", "rouge2", "rougeL" or their mean "rouge"; "length_penalty", "copy_penalty". By default
            `WEIGHTS`, and none where `rewards` or `reward_fn` is given.
        use_stemmer: ROUGE compares English words without their endings.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        document: str = "document",
        summary: str = "summary",
        template: str = "t5",
        words: int | Sequence[int] | None = None,
        tokens: int | Sequence[int] | None = None,
        copied: int = 4,
        reward_weights: Mapping[str, float] | None = None,
        use_stemmer: bool = True,
        rewards: Any = None,
        reward_fn: Any = None,
        **options: Any,
    ) -> None:
        def make(name: str, weight: float) -> Reward:
            settings: dict[str, Any] = {"use_stemmer": use_stemmer}
            columns: dict[str, Any] = {"summary": self.reference}
            if name == "length_penalty":
                settings = {"words": words, "tokens": tokens}
            elif name == "copy_penalty":
                settings, columns["document"] = {"n": copied}, self.text
            return metric_reward(name, weight, columns=columns, **settings)

        every = with_metrics(rewards, reward_fn, reward_weights, WEIGHTS, make)
        super().__init__(model, tokenizer, rewards=every, reward_fn=reward_fn, **options)
        self.document, self.summary = document, summary
        self.template = PromptTemplate(TEMPLATES.get(template, template), ("document",))
        self.use_stemmer = use_stemmer

    def build_prompt(self, task: Mapping[str, Any]) -> str:
        return self.written(self.template.fill({"document": self.cut(self.text(task))}))

    def metrics(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Mean ROUGE-1, -2 and -L, 0 to 100, over the episodes that have a reference."""
        completions = [episode.completion for episode in episodes]
        summaries = [self.reference(episode.task) for episode in episodes]
        return corpus_rouge(completions, summaries, use_stemmer=self.use_stemmer)

    def text(self, task: Mapping[str, Any]) -> str:
        """A task's whole document."""
        return text_of(task, (self.document, "prompt"))

    def reference(self, task: Mapping[str, Any]) -> str | list[str] | None:
        """What a task's summary is compared with; None where it has nothing."""
        return reference_of(task, self.summary)
