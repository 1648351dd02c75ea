"""Scores as a reward returned them, checked: a reward that is not a number never reaches a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from etude.errors import ConfigError, RewardError
from etude.types import Episode


def check_scores(scores: Any, name: str, episodes: Sequence[Episode]) -> list[float | None]:
    """One finite float or None per episode.

    Args:
        scores: a list or tuple of numbers, numpy or torch scalars and None, or a 1-D array or tensor.
        name: the reward's name.
        episodes: what was scored.

    Raises:
        RewardError: too few or too many scores, or one that is NaN, infinite or not a number; it names the
            reward and the episodes.
    """
    if callable(getattr(scores, "tolist", None)):  # numpy and torch, without importing them
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        raise RewardError(
            f"reward {name!r} returned {_short(scores)}; expected a list of {len(episodes)} scores, "
            f"one per episode: a number, or None where it does not apply"
        )
    if len(scores) != len(episodes):
        few, many = len(scores) < len(episodes), "the first without a score is "
        where = many + where_is(len(scores), episodes) if few else "the last are too many"
        raise RewardError(
            f"reward {name!r} returned {len(scores)} scores for {len(episodes)} episodes ({where}); "
            f"expected one per episode: a number, or None where it does not apply"
        )
    numbers: list[float | None] = []
    wrong: list[int] = []
    for index, score in enumerate(scores):
        try:
            numbers.append(_number(score))
        except (TypeError, ValueError, OverflowError):  # said once, for all of them, below
            wrong.append(index)
    if wrong:
        more = f" (and for {len(wrong) - 1} more: {', '.join(map(str, wrong[1:]))})" if wrong[1:] else ""
        raise RewardError(
            f"reward {name!r} returned {_short(scores[wrong[0]])} for {where_is(wrong[0], episodes)}{more}; "
            f"expected a finite number, or None where it does not apply"
        )
    return numbers


def check_weight(weight: float, name: str) -> float:
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise ConfigError(f"the weight of reward {name!r} is {weight!r}; expected a finite number")
    return float(weight)


def where_is(index: int, episodes: Sequence[Episode]) -> str:
    """For messages: `episode 3, prompt 'What is 2 + …'`."""
    episode = episodes[index]
    prompt = episode.prompt or str(episode.task.get("prompt", ""))
    return f"episode {index}, prompt {_short(prompt)}"


def _number(score: Any) -> float | None:
    if score is None:
        return None
    item = getattr(score, "item", None)
    if callable(item) and math.prod(getattr(score, "shape", ())) == 1:
        score = item()
    if not isinstance(score, Real):
        raise TypeError("not a number")
    number = float(score)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
