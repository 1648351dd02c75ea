"""Translation: a text in one language, an answer in another, and how near it comes to a reference.

    env = TranslationEnvironment(model, tokenizer, source="en", target="de",
                                 source_language="English", target_language="German")

Not covered: several target languages in one run of mBART or NLLB, whose decoder begins with one for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.environments.prompts import PromptTemplate, reference_of, text_of
from etude.environments.single_turn import SingleTurnEnvironment, with_metrics
from etude.errors import DataError
from etude.protocols import Reward
from etude.rewards.metrics import metric_reward
from etude.rewards.translation import corpus_scores
from etude.types import Episode

_LANGUAGES = ("source_language", "target_language")
_FIELDS = ("source", *_LANGUAGES)
T5 = PromptTemplate("translate {source_language} to {target_language}: {source}", _FIELDS)
BARE = PromptTemplate("{source}", _FIELDS)


class TranslationEnvironment(SingleTurnEnvironment):
    """Translates a task's text, and scores it by a reference.

    Args:
        model, tokenizer, options: as for `SingleTurnEnvironment`. mBART, NLLB and their like are told the
            target language by `generation_kwargs`: `forced_bos_token_id` (or `decoder_start_token_id`), and
            the source's by the tokenizer's `src_lang`.
        source, target: columns of the text and of its reference, in a task or in its mapping `translation`,
            as data sets of the hub have them. A reference is a text or a list of them; a task may have none.
        source_language, target_language: their names; columns of these names in a task go first.
        template: the prompt, with {source} and perhaps {source_language} and {target_language}. By default
            T5's, "translate English to German: …", where a task's languages are known, and else the text
            alone, which Marian and mBART read.
        reward_weights: "chrf", "bleu" and "ter" by the weights that they have in a reward, beside `rewards`.
            By default chrF++ alone, and none where `rewards` or `reward_fn` is given.
        bleu_tokenize: how BLEU finds words, see `rewards.translation.bleu`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        source: str = "source",
        target: str = "target",
        source_language: str | None = None,
        target_language: str | None = None,
        template: str | None = None,
        reward_weights: Mapping[str, float] | None = None,
        bleu_tokenize: str | None = None,
        rewards: Any = None,
        reward_fn: Any = None,
        **options: Any,
    ) -> None:
        def make(name: str, weight: float) -> Reward:
            settings = {"tokenize": bleu_tokenize} if name == "bleu" else {}
            return metric_reward(name, weight, columns={"target": self.reference}, **settings)

        every = with_metrics(rewards, reward_fn, reward_weights, {"chrf": 1.0}, make)
        super().__init__(model, tokenizer, rewards=every, reward_fn=reward_fn, **options)
        self.source, self.target = source, target
        self.languages = {"source_language": source_language, "target_language": target_language}
        self.template = None if template is None else PromptTemplate(template, _FIELDS)
        self.bleu_tokenize = bleu_tokenize

    def build_prompt(self, task: Mapping[str, Any]) -> str:
        values = {name: str(task.get(name) or given or "") for name, given in self.languages.items()}
        template = self.template or (T5 if all(values.values()) else BARE)
        if missing := [name for name in _LANGUAGES if name in template.used and not values[name]]:
            raise DataError(
                f"the template has {{{missing[0]}}}, and a task has no column {missing[0]!r}, only "
                f"{', '.join(map(repr, task))}; give the environment a {missing[0]}"
            )
        text = self.cut(text_of(task, (self.source, "prompt"), inside="translation"))
        return self.written(template.fill({**values, "source": text}))

    def metrics(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Corpus chrF++, BLEU and TER, 0 to 100, over the episodes that have a reference."""
        completions = [episode.completion for episode in episodes]
        targets = [self.reference(episode.task) for episode in episodes]
        return corpus_scores(completions, targets, tokenize=self.bleu_tokenize)

    def reference(self, task: Mapping[str, Any]) -> str | list[str] | None:
        """What a task's translation is compared with; None where it has nothing."""
        return reference_of(task, self.target, inside="translation")
