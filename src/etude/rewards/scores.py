"""Scores as a reward returned them, checked: a reward that is not a number never reaches a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

from etude.errors import ConfigError, RewardError
from etude.rewards.levels import Level, positions
from etude.types import Episode


def check_scores(scores: Any, name: str, episodes: Sequence[Episode], level: Level = "episode") -> list[Any]:
    """One score per episode: a finite float or None, and at the levels "turn" and "token" a list of these.

    Args:
        scores: a list or tuple of numbers, numpy or torch scalars and None, or an array or tensor. At the
            other levels of such lists, with one number or None per turn or sampled token of the episode; None
            for one to which the reward doesn't apply.
        name: the reward's name.
        episodes: what was scored.
        level: what the scores belong to.

    Raises:
        RewardError: too few or too many scores, or one that is NaN, infinite or not a number; it names the
            reward and the episodes.
    """
    scores = _plain(scores)
    each = _EACH if level == "episode" else f"a list with a score per {_UNITS[level]}, or None"
    if not isinstance(scores, list | tuple):
        raise RewardError(
            f"reward {name!r} returned {_short(scores)}; expected a list of {len(episodes)} scores, "
            f"one per episode: {each}"
        )
    if len(scores) != len(episodes):
        few, many = len(scores) < len(episodes), "the first without a score is "
        where = many + where_is(len(scores), episodes) if few else "the last are too many"
        raise RewardError(
            f"reward {name!r} returned {len(scores)} scores for {len(episodes)} episodes ({where}); "
            f"expected one per episode: {each}"
        )
    if level != "episode":
        return [_within(score, name, i, episodes, level) for i, score in enumerate(scores)]
    numbers, wrong = _numbers(scores)
    if wrong:
        named = [*map(str, wrong[1:_NAMED]), *(["…"] if wrong[_NAMED:] else [])]
        more = f" (and for {len(wrong) - 1} more: {', '.join(named)})" if named else ""
        first = scores[wrong[0]]
        hint = '. A list per episode needs level="turn" or "token"' if isinstance(first, list | tuple) else ""
        raise RewardError(
            f"reward {name!r} returned {_short(first)} for {where_is(wrong[0], episodes)}{more}; "
            f"expected a finite number, or None where it does not apply{hint}"
        )
    return numbers


_NAMED = 9  # episodes in a message
_EACH = "a number, or None where it does not apply"
_UNITS = {"turn": "turn", "token": "sampled token"}


def _within(
    scores: Any, name: str, index: int, episodes: Sequence[Episode], level: Literal["turn", "token"]
) -> list[float | None] | None:
    """One episode's scores at a level within it."""
    if scores is None:
        return None
    scores, unit, count = _plain(scores), _UNITS[level], len(positions(episodes[index], level))
    units, where = unit if count == 1 else f"{unit}s", where_is(index, episodes)
    if not isinstance(scores, list | tuple):
        raise RewardError(
            f"reward {name!r} returned {_short(scores)} for {where}; expected a list of {count} scores, one "
            f"per {unit}: {_EACH}"
        )
    if len(scores) != count:
        raise RewardError(
            f"reward {name!r} returned {len(scores)} scores for the {count} {units} of {where}; expected one "
            f"per {unit}: {_EACH}"
        )
    numbers, wrong = _numbers(scores)
    if wrong:
        raise RewardError(
            f"reward {name!r} returned {_short(scores[wrong[0]])} for {unit} {wrong[0]} of {where}; expected "
            f"a finite number, or None where it does not apply"
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


def _plain(scores: Any) -> Any:
    """Arrays and tensors as lists, without importing numpy and torch."""
    return scores.tolist() if callable(getattr(scores, "tolist", None)) else scores


def _numbers(scores: Sequence[Any]) -> tuple[list[float | None], list[int]]:
    """The scores as numbers, and places of what is none."""
    numbers: list[float | None] = []
    wrong: list[int] = []
    for place, score in enumerate(scores):
        try:
            numbers.append(_number(score))
        except (TypeError, ValueError, OverflowError):  # said once, for all of them, by the caller
            wrong.append(place)
    return numbers, wrong


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
