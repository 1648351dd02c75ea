"""Translations by their references, by sacrebleu: chrF++, BLEU and TER, of sentences and of corpora.

    chrf, bleu, ter     f(completions, target) -> scores in [0, 1], 1 being best; None without a reference
    corpus_scores       all three of all answers together, as papers print them: 0 to 100

A reference is a text, or a list of several. White space around an answer doesn't count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from etude.errors import ConfigError
from etude.rewards.metrics import metric, references, required


@metric
def chrf(completions: Sequence[str], target: Sequence[Any], *, word_order: int = 2) -> list[float | None]:
    """F₂ of character n-grams up to 6 and word n-grams up to `word_order`, by sentence.

    Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation"; with words (2) chrF++, Popović
    2017, "chrF++: words helping character n-grams". A part of a word that is right counts, which makes it the
    smoothest of the three to learn from.
    """
    scorer = required("sacrebleu").CHRF(word_order=word_order)
    return _by_sentence(scorer, completions, target, lambda score: score / 100)


@metric
def bleu(
    completions: Sequence[str], target: Sequence[Any], *, tokenize: str | None = None
) -> list[float | None]:
    """BLEU by sentence: smoothed (exponentially), of n-grams as long as the sentence has.

    Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation"; smoothing: Chen &
    Cherry 2014, "A systematic comparison of smoothing techniques for sentence-level BLEU", method 3.

    Args:
        tokenize: how sacrebleu finds words: "13a" by default, "zh", "char", "intl", …
    """
    scorer = _bleu(tokenize, effective_order=True)
    return _by_sentence(scorer, completions, target, lambda score: score / 100)


@metric
def ter(completions: Sequence[str], target: Sequence[Any]) -> list[float | None]:
    """1 − TER by sentence, at least 0. TER: edits, shifts among them, over the reference's words.

    Snover et al. 2006, "A study of translation edit rate with targeted human annotation".
    """
    scorer = required("sacrebleu").TER()
    return _by_sentence(scorer, completions, target, lambda score: max(1 - score / 100, 0.0))


def corpus_scores(
    completions: Sequence[str], target: Sequence[Any], *, word_order: int = 2, tokenize: str | None = None
) -> dict[str, float]:
    """Corpus chrF, BLEU and TER (the lower the better), 0 to 100, of what has a reference; else nothing."""
    library = required("sacrebleu")
    pairs = list(zip(completions, (references(each, "target") for each in target), strict=True))
    answers = [answer.strip() for answer, texts in pairs if texts]
    if not answers:
        return {}
    streams = list(zip_longest(*(texts for _, texts in pairs if texts)))  # None where there are fewer
    scorers = {
        "chrf": library.CHRF(word_order=word_order),
        "bleu": _bleu(tokenize),
        "ter": library.TER(),
    }
    return {name: float(each.corpus_score(answers, streams).score) for name, each in scorers.items()}


def _bleu(tokenize: str | None, **settings: Any) -> Any:
    scorer = required("sacrebleu").BLEU
    if tokenize is not None and tokenize not in scorer.TOKENIZERS:
        raise ConfigError(f"tokenize is {tokenize!r}; sacrebleu has {', '.join(scorer.TOKENIZERS)}")
    return scorer(tokenize=tokenize, force=True, **settings)  # force: no warning about " ." at ends


def _by_sentence(
    scorer: Any, completions: Sequence[str], target: Sequence[Any], scale: Callable[[float], float]
) -> list[float | None]:
    scores: list[float | None] = []
    for completion, value in zip(completions, target, strict=True):
        texts = references(value, "target")
        score = scorer.sentence_score(completion.strip(), texts).score if texts else None
        scores.append(None if score is None else min(scale(score), 1.0))
    return scores
