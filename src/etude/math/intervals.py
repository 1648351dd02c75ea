"""How far a measured rate or mean can be trusted: confidence intervals over tasks, alone and in pairs.

Tasks are what is drawn at random, so a task's samples stay together. What is measured is a ratio of sums over
the tasks [N]: hits over trials, tokens over episodes.

    rates          Wilson's interval, at as many independent trials as the tasks are worth
    their paired   Newcombe's, from the two Wilson intervals and the correlation between the sides
    differences
    means          percentile bootstrap over tasks; paired: the same tasks in both, resampled together
    distinct-n     jackknife over tasks: resampling would count a task's words twice
    metrics of an  jackknife over groups of tasks
    environment

Not covered: comparing runs on different tasks, correction for many comparisons. Bounds are NaN where fewer
than two tasks say anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from etude.errors import ConfigError
from etude.math.masked import require_same_shape

_CELLS = 1 << 22  # of resampled counts in memory at once


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def check_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected between 0 and 1, such as 0.95")
    return confidence


def normal_quantile(confidence: float) -> float:
    """How many standard deviations the interval reaches to each side: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + check_confidence(confidence)) / 2)


def wilson(rate: float, trials: float, confidence: float = 0.95) -> Interval:
    """The score interval of a binomial rate: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n).

    Wilson 1927, "Probable inference, the law of succession, and statistical inference". It holds near 0 and
    1, and never leaves them.
    """
    if trials <= 0:
        return Interval(rate, math.nan, math.nan)
    z = normal_quantile(confidence)
    scale = 1 + z * z / trials
    center = (rate + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    return Interval(rate, max(center - half, 0.0), min(center + half, 1.0))


def ratio(sums_N: Tensor, counts_N: Tensor) -> float:
    """Σ sums / Σ counts; NaN where nothing was counted."""
    total = float(counts_N.sum())
    return float(sums_N.sum()) / total if total else math.nan


def independent_trials(hits_N: Tensor, trials_N: Tensor, most: float | None = None) -> float:
    """How many independent trials would give the rate Σ hits / Σ trials the variance that it has over tasks.

    p(1 − p) / Var p, where Var p = Σ (h − p t)² / (Σ t)² (Kish 1965, "Survey sampling"; for Wilson's interval
    Korn & Graubard 1998). No less than the number of tasks and no more than `most`: where all tasks agree
    (p is 0 or 1) only their number counts. With one trial per task it is the number of tasks.

    Args:
        hits_N, trials_N: per task, [N], floating point.
        most: independent trials at most; the number of trials by default.
    """
    require_same_shape(hits_N=hits_N, trials_N=trials_N)
    tasks, total, rate = float((trials_N > 0).sum()), float(trials_N.sum()), ratio(hits_N, trials_N)
    variance = _cross(hits_N, trials_N, hits_N, trials_N)
    if not total or not 0 < rate < 1:
        return tasks
    bound = max(total if most is None else most, tasks)
    return min(max(rate * (1 - rate) / variance, tasks), bound) if variance else bound


def rate_interval(
    hits_N: Tensor, trials_N: Tensor, confidence: float = 0.95, most: float | None = None
) -> Interval:
    """Wilson's interval of Σ hits / Σ trials. Arguments as for `independent_trials`."""
    return wilson(ratio(hits_N, trials_N), independent_trials(hits_N, trials_N, most), confidence)


def rate_difference(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    confidence: float = 0.95,
    most: float | None = None,
) -> Interval:
    """First rate − second rate on the same tasks, each a pair (hits [N], trials [N]).

    Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", method 10: the distances from the rates to their Wilson bounds, added as two sides of a
    triangle, with the correlation φ between the tasks' rates as the cosine,

        low = d − √((p − l)² − 2 φ (p − l)(u' − p') + (u' − p')²),

    and `high` accordingly. A positive covariance is first lowered by the equivalent of half a task (as
    there), so that two sides that agree on every task still leave room for doubt. With several samples per
    task φ is that of the tasks' rates (Zou & Donner 2008 for the general form).
    """
    p, q = rate_interval(*first, confidence, most), rate_interval(*second, confidence, most)
    covariance, tasks = _cross(*first, *second), len(first[0])
    spread = math.sqrt(_cross(*first, *first) * _cross(*second, *second))
    if covariance > 0:
        covariance = max(covariance - 1 / (2 * tasks * tasks), 0.0)
    phi = covariance / spread if spread else 0.0
    value = p.value - q.value
    low = _third_side(p.value - p.low, q.high - q.value, phi)
    high = _third_side(p.high - p.value, q.value - q.low, phi)
    return Interval(value, max(value - low, -1.0), min(value + high, 1.0))


def _cross(hits_N: Tensor, trials_N: Tensor, others_N: Tensor, their_trials_N: Tensor) -> float:
    """The covariance of two rates over tasks, to first order; of a rate with itself: its variance."""
    require_same_shape(hits_N=hits_N, trials_N=trials_N, others_N=others_N, their_trials_N=their_trials_N)
    first, second = _influence(hits_N, trials_N), _influence(others_N, their_trials_N)
    return float((first * second).sum())


def _influence(hits_N: Tensor, trials_N: Tensor) -> Tensor:
    """How much each task moves the rate: (h − p t) / Σ t."""
    return (hits_N - ratio(hits_N, trials_N) * trials_N) / trials_N.sum()


def _third_side(a: float, b: float, cosine: float) -> float:
    return math.sqrt(max(a * a - 2 * cosine * a * b + b * b, 0.0))


def bootstrap(sums_NM: Tensor, counts_NM: Tensor, resamples: int = 2000, seed: int = 0) -> Tensor:
    """Ratios Σ sums / Σ counts of `resamples` draws of N tasks with replacement, [R, M].

    Efron 1979, "Bootstrap methods: another look at the jackknife". The same seed and number of tasks draw the
    same tasks: the difference of two sides' results is a paired bootstrap. NaN where a draw counts nothing.

    Args:
        sums_NM, counts_NM: of M quantities per task.
    """
    require_same_shape(sums_NM=sums_NM, counts_NM=counts_NM)
    tasks = len(sums_NM)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, resamples, rows := max(_CELLS // max(tasks, 1), 1)):
        drawn_RN = torch.randint(tasks, (min(rows, resamples - start), tasks), generator=generator)
        times_RN = torch.zeros(drawn_RN.shape, dtype=sums_NM.dtype)
        times_RN.scatter_add_(1, drawn_RN, torch.ones_like(times_RN))
        parts.append((times_RN @ sums_NM) / (times_RN @ counts_NM))
    return torch.cat(parts)


def percentile_interval(value: float, draws_R: Tensor, tasks: int, confidence: float = 0.95) -> Interval:
    """An estimate, between the quantiles of what resampling gave."""
    check_confidence(confidence)
    if tasks < 2:
        return Interval(value, math.nan, math.nan)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=draws_R.dtype)
    low, high = draws_R.nanquantile(ends).tolist()
    return Interval(value, low, high)


def jackknife(value: float, without_N: Tensor, confidence: float = 0.95) -> Interval:
    """value ± z √((N − 1)/N Σ (θ₋ᵢ − mean)²), from the N estimates that leave one task out each.

    Groups of tasks can take the place of tasks: N is then their number.

    Tukey 1958; Efron & Tibshirani 1993, "An introduction to the bootstrap", equation 11.5.
    """
    tasks = len(without_N)
    if tasks < 2:
        return Interval(value, math.nan, math.nan)
    squares = (without_N - without_N.mean()).square().sum()
    half = normal_quantile(confidence) * math.sqrt((tasks - 1) / tasks * float(squares))
    return Interval(value, value - half, value + half)
