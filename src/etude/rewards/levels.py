"""Where scores sit in an episode: at its end, at each turn of the model, or at each token it sampled.

Not covered: what they do to the update there (`trainers`).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from etude.errors import ConfigError
from etude.types import Episode, NamedReward

Level = Literal["episode", "turn", "token"]

# What a reward gives for an episode: a score, or at the levels "turn" and "token" one for each of them.
Score = float | list[float | None] | None


def level_of(reward: Any) -> Level:
    """A reward's `level`; "episode" for one without.

    Raises:
        ConfigError: there is no such level.
    """
    return check_level(getattr(reward, "level", "episode"), reward.name)


def check_level(level: Any, name: str) -> Level:
    if level not in get_args(Level):
        raise ConfigError(f"the level of reward {name!r} is {level!r}; expected episode, turn or token")
    return level


def positions(episode: Episode, level: Literal["turn", "token"]) -> list[int | None]:
    """Indices into the episode's tokens, one per score.

    A turn's score sits on its last token, which is the last that was sampled in it: forced tokens only begin
    turns. That of a turn with forced tokens only sits on the last of these, and without any on the token
    before; None at the very beginning.
    """
    if level == "token":
        return [place for place, sampled in enumerate(episode.sampled) if sampled]
    ends: list[int] = []
    before = None
    for _, end, segment in episode.spans():
        if before is not None and segment.completes(before):
            ends[-1] = end
        elif segment.source == "model":
            ends.append(end)
        before = segment
    return [end - 1 if end else None for end in ends]


def named_rewards(
    score: Score, name: str, weight: float, level: Level, episode: Episode
) -> list[NamedReward]:
    """What an episode records of a score: what applies, where it sits; at least one reward in any case."""
    if not isinstance(score, list):
        return [NamedReward(name, score, weight)]
    assert level != "episode"
    places = zip(score, positions(episode, level), strict=True)
    placed = [NamedReward(name, value, weight, place) for value, place in places if value is not None]
    return placed or [NamedReward(name, None, weight)]
