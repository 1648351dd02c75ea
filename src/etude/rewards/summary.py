"""Summaries by their references and documents: ROUGE by rouge-score, penalties on length and on copying.

    rouge, rouge1, rouge2, rougeL    f(completions, summary) -> F₁ in [0, 1]; None without a reference
    length_penalty                   too long or too short: −1 to 0
    copy_penalty                     taken over word for word, beyond what the reference does: −1 to 0
    corpus_rouge                     means over all answers, as papers print them: 0 to 100

A reference is a text or a list of several, of which the best match counts. rouge-score's words are runs of
ASCII letters and digits: for other scripts compare characters (`rewards.translation.chrf`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from etude.errors import ConfigError
from etude.rewards.metrics import metric, references, required
from etude.types import Episode

KINDS = ("rouge1", "rouge2", "rougeL")


@metric
def rouge(
    completions: Sequence[str],
    summary: Sequence[Any],
    *,
    kinds: Sequence[str] = KINDS,
    use_stemmer: bool = True,
) -> list[float | None]:
    """The mean of F₁ of words (rouge1), of pairs of words (rouge2), of the longest subsequence (rougeL).

    Lin 2004, "ROUGE: a package for automatic evaluation of summaries".

    Args:
        kinds: which; also rougeLsum, the subsequence line by line.
        use_stemmer: compare English words without their endings (Porter 1980).
    """
    found = _rouge(completions, summary, kinds, use_stemmer)
    return [None if scores is None else sum(scores.values()) / len(scores) for scores in found]


@metric
def rouge1(
    completions: Sequence[str], summary: Sequence[Any], *, use_stemmer: bool = True
) -> list[float | None]:
    return rouge(completions, summary, kinds=("rouge1",), use_stemmer=use_stemmer)


@metric
def rouge2(
    completions: Sequence[str], summary: Sequence[Any], *, use_stemmer: bool = True
) -> list[float | None]:
    return rouge(completions, summary, kinds=("rouge2",), use_stemmer=use_stemmer)


@metric
def rougeL(
    completions: Sequence[str], summary: Sequence[Any], *, use_stemmer: bool = True
) -> list[float | None]:
    return rouge(completions, summary, kinds=("rougeL",), use_stemmer=use_stemmer)


@metric
def length_penalty(
    completions: Sequence[str],
    summary: Sequence[Any] | None = None,
    episodes: Sequence[Episode] | None = None,
    *,
    words: int | Sequence[int] | None = None,
    tokens: int | Sequence[int] | None = None,
) -> list[float | None]:
    """How far an answer of n is from a length: −(low − n) / low if shorter, −(n − high) / high if longer.

    At most −1.

    Args:
        words, tokens: the length, or a shortest and a longest one that are both fine, in words or in sampled
            tokens; with neither, the reference's words (None without a reference).

    Raises:
        ConfigError: both are given, or one isn't a length or two.
    """
    if words is not None and tokens is not None:
        raise ConfigError("words and tokens are two ways to measure a length; give one of them")
    counts = [len(completion.split()) for completion in completions]
    if tokens is not None:
        if episodes is None:
            raise ConfigError("length_penalty counts tokens of episodes; pass episodes, or words instead")
        counts = [sum(episode.sampled) for episode in episodes]
    wanted = tokens if words is None else words
    if wanted is not None:
        bounds = _bounds(wanted)
        return [_off(count, bounds) for count in counts]
    texts_N = [references(each, "summary") for each in summary or [None] * len(counts)]
    lengths_N = [[len(text.split()) for text in texts] for texts in texts_N]
    return [
        _off(count, (min(lengths), max(lengths))) if lengths else None
        for count, lengths in zip(counts, lengths_N, strict=True)
    ]


@metric
def copy_penalty(
    completions: Sequence[str], document: Sequence[Any], summary: Sequence[Any] | None = None, *, n: int = 4
) -> list[float | None]:
    """−max(0, c − r): c is the share of an answer's word n-grams that the document has, r the reference's.

    The share is 0 for a text of fewer than n words, and r without a reference; of several references the one
    that copies most counts. None without a document.

    Raises:
        ConfigError: n is below 1.
    """
    if n < 1:
        raise ConfigError(f"n is {n}; expected n-grams of at least 1 word")
    scores: list[float | None] = []
    for completion, source, value in zip(
        completions, document, summary or [None] * len(completions), strict=True
    ):
        if not source:
            scores.append(None)
            continue
        grams = set(_grams(source, n))
        usual = max((_share(text, grams, n) for text in references(value, "summary")), default=0.0)
        scores.append(-max(_share(completion, grams, n) - usual, 0.0))
    return scores


def corpus_rouge(
    completions: Sequence[str],
    summary: Sequence[Any],
    *,
    kinds: Sequence[str] = KINDS,
    use_stemmer: bool = True,
) -> dict[str, float]:
    """Mean F₁ of each kind over what has a reference, 0 to 100; nothing where nothing has one."""
    found = [each for each in _rouge(completions, summary, kinds, use_stemmer) if each is not None]
    return {kind: 100 * sum(each[kind] for each in found) / len(found) for kind in kinds if found}


def _rouge(
    completions: Sequence[str], summary: Sequence[Any], kinds: Sequence[str], use_stemmer: bool
) -> list[dict[str, float] | None]:
    if not kinds or any(re.fullmatch(r"rouge([1-9]|L|Lsum)", kind) is None for kind in kinds):
        raise ConfigError(f"kinds is {kinds!r}; expected some of rouge1, rouge2, …, rougeL and rougeLsum")
    scorer = required("rouge_score.rouge_scorer").RougeScorer(list(kinds), use_stemmer=use_stemmer)
    found: list[dict[str, float] | None] = []
    for completion, value in zip(completions, summary, strict=True):
        texts = references(value, "summary")
        scores = scorer.score_multi(texts, completion) if texts else None
        found.append(None if scores is None else {kind: float(scores[kind].fmeasure) for kind in kinds})
    return found


def _bounds(wanted: int | Sequence[int]) -> tuple[int, int]:
    pair = list(wanted) if isinstance(wanted, Sequence) else [wanted, wanted]
    if [type(each) for each in pair] != [int, int] or not 1 <= pair[0] <= pair[1]:
        raise ConfigError(
            f"the length is {wanted!r}; expected a number of at least 1, or a shortest and a longest"
        )
    return pair[0], pair[1]


def _off(count: int, bounds: tuple[int, int]) -> float:
    low, high = bounds
    if count < low:
        return -(low - count) / low
    return -min((count - high) / high, 1.0) if count > high else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _share(text: str, grams: set[tuple[str, ...]], n: int) -> float:
    own = _grams(text, n)
    return sum(gram in grams for gram in own) / len(own) if own else 0.0
