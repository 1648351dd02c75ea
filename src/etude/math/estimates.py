"""What several samples of a task say: pass@k, and how varied they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.errors import ConfigError


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """The chance that at least one of k samples succeeds: 1 − C(n − c, k) / C(n, k), unbiased.

    Chen et al. 2021, "Evaluating large language models trained on code", equation 1.

    Raises:
        ConfigError: not 0 ≤ successes ≤ samples, or not 1 ≤ k ≤ samples.
    """
    if not 0 <= successes <= samples or not 1 <= k <= samples:
        raise ConfigError(
            f"pass@{k} of {samples} samples, {successes} of them right; expected 1 <= k <= samples and "
            "0 <= successes <= samples"
        )
    return 1 - math.comb(samples - successes, k) / math.comb(samples, k)


@dataclass(frozen=True, slots=True)
class Distinct:
    """Different n-grams over all n-grams.

    Attributes:
        value: of all tasks; NaN where there are no n-grams.
        without_N: of all tasks but one, for each of them, [N].
    """

    value: float
    without_N: Tensor


def distinct(sequences_by_task: Sequence[Sequence[Sequence[Hashable]]], n: int) -> Distinct:
    """distinct-n: the number of different n-grams over that of all n-grams.

    Li et al. 2016, "A diversity-promoting objective function for neural conversation models" (arXiv
    1510.03055), section 5.2. It falls as more is measured: compare the same number of tasks and samples.

    Args:
        sequences_by_task: for each task its sequences (tokens, words); n-grams don't reach over their ends.

    Raises:
        ConfigError: n is below 1.
    """
    if n < 1:
        raise ConfigError(f"distinct-{n}; expected n >= 1")
    by_task = [Counter(gram for tokens in task for gram in _grams(tokens, n)) for task in sequences_by_task]
    tasks_with = Counter(gram for grams in by_task for gram in grams)
    different, total = len(tasks_with), sum(grams.total() for grams in by_task)
    without = []
    for grams in by_task:
        own, rest = sum(tasks_with[gram] == 1 for gram in grams), total - grams.total()
        without.append((different - own) / rest if rest else math.nan)
    value = different / total if total else math.nan
    return Distinct(value, torch.tensor(without, dtype=torch.float64))


def _grams(tokens: Sequence[Hashable], n: int) -> Sequence[tuple[Hashable, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))
