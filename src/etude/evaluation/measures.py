"""From tallies to numbers with intervals: each measure of a tally, and its difference from another's.

Both tallies of a difference are of the same tasks in the same order. Which interval is whose says
`math.intervals`.
"""

from __future__ import annotations

import torch

from etude.evaluation.tally import Counted, Tally
from etude.math.intervals import (
    Interval,
    bootstrap,
    jackknife,
    percentile_interval,
    rate_difference,
    rate_interval,
    ratio,
)

Measures = dict[str, Interval]


def measure(tally: Tally, confidence: float = 0.95) -> Measures:
    """Every quantity of a tally."""
    found = {name: rate_interval(*rate, confidence, _most(name, tally)) for name, rate in tally.rates.items()}
    draws_RM = _resampled(tally)
    for place, (name, mean) in enumerate(tally.means.items()):
        tasks = int((mean.counts_N > 0).sum())
        found[name] = percentile_interval(ratio(*mean), draws_RM[:, place], tasks, confidence)
    for name, each in tally.distinct.items():
        around = jackknife(each.value, each.without_N, confidence)
        found[name] = Interval(around.value, max(around.low, 0.0), min(around.high, 1.0))
    for name, whole in tally.wholes.items():
        found[name] = jackknife(*whole, confidence)
    return found


def compare(first: Tally, second: Tally, confidence: float = 0.95) -> Measures:
    """First − second, for every quantity that both have."""
    found = {
        name: rate_difference(rate, second.rates[name], confidence, _most(name, first, second))
        for name, rate in first.rates.items()
        if name in second.rates
    }
    draws, others = _resampled(first), _resampled(second)
    theirs = {name: place for place, name in enumerate(second.means)}
    for place, (name, mean) in enumerate(first.means.items()):
        if name not in second.means:
            continue
        other = second.means[name]
        value, both = ratio(*mean) - ratio(*other), (mean.counts_N > 0) & (other.counts_N > 0)
        differences_R = draws[:, place] - others[:, theirs[name]]
        found[name] = percentile_interval(value, differences_R, int(both.sum()), confidence)
    for name, each in first.distinct.items():
        if name in second.distinct:
            theirs_too = second.distinct[name]
            without_N = each.without_N - theirs_too.without_N
            found[name] = jackknife(each.value - theirs_too.value, without_N, confidence)
    for name, whole in first.wholes.items():
        if name in second.wholes:
            value, without_G = second.wholes[name]
            found[name] = jackknife(whole.value - value, whole.without_G - without_G, confidence)
    return found


def _most(name: str, *tallies: Tally) -> float | None:
    """pass@k has one estimate per task, which is worth up to as many trials as it was made of."""
    return min(tally.episodes for tally in tallies) if name.startswith("pass@") else None


def _resampled(tally: Tally) -> torch.Tensor:
    means: list[Counted] = list(tally.means.values())
    return bootstrap(
        torch.stack([mean.sums_N for mean in means], 1), torch.stack([mean.counts_N for mean in means], 1)
    )
