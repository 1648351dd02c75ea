"""Turns by weight: an endless sequence in which each of several takes its share, as evenly as can be.

Covered: whose turn the n-th is, in closed form, so that a run goes on at any place. Not covered: what is done
in a turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def turn(number: int, weights: Sequence[float], offsets: Sequence[float]) -> tuple[int, int]:
    """Whose turn the `number`-th is, from 0, and how many turns they had before.

    The k-th turn of i is due at time (k + offset_i) / share_i, and turns come in the order of these times,
    equal ones in that of i (stride scheduling: Waldspurger and Weihl 1995, "Stride scheduling: deterministic
    proportional-share resource management", section 2). So each one's turns are its share of any stretch, to
    within a few.

    Args:
        weights: above 0; shares are weights over their sum.
        offsets: in [0, 1), by which equal weights don't always come in the same order.
    """
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    # Turns that are over by a time at which some of those before `number` are still to come.
    time = number - 2 * len(shares) - 1
    had = [max(math.ceil(time * s - offset), 0) for s, offset in zip(shares, offsets, strict=True)]
    for _ in range(number - sum(had) + 1):
        due = [(count + offset) / s for count, offset, s in zip(had, offsets, shares, strict=True)]
        now = due.index(min(due))
        had[now] += 1
    return now, had[now] - 1
