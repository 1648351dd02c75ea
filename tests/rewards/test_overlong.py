"""DAPO's overlong penalty, against numbers worked by hand."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import ConfigError
from etude.protocols import Reward
from etude.rewards.mixture import score_episodes
from etude.rewards.overlong import OverlongPenalty
from etude.types import Episode, NamedReward, Segment


def sampled(*counts):
    """An episode of turns with so many sampled tokens, each after as many of a tool's."""
    segments = [Segment("prompt", "p", [0] * 50)]
    for count in counts:
        segments += [Segment("tool", "t", [0] * count), Segment("model", "m", [0] * count, policy_version=0)]
    return Episode(segments=segments)


def penalties(penalty, episodes):
    return asyncio.run(penalty(episodes))


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, 0.0),
        (15, 0.0),
        (16, 0.0),
        (17, -0.25),
        (18, -0.5),
        (19, -0.75),
        (20, -1.0),
        (21, -1.0),
        (99, -1.0),
    ],
)
def test_numbers_worked_by_hand(count, expected):
    assert penalties(OverlongPenalty(20, 4), [sampled(count)]) == [expected]


def test_the_published_setting():
    """16,384 tokens are free, 20,480 are too many; halfway between costs half."""
    found = penalties(OverlongPenalty(20_480, 4_096), [sampled(n) for n in (16_384, 18_432, 20_480)])
    assert found == [0.0, -0.5, -1.0]


def test_all_turns_count_and_nothing_else():
    forced = Episode(segments=[Segment("prompt", "p", []), Segment("model", "m", [0] * 30)])
    assert penalties(OverlongPenalty(20, 4), [sampled(9, 9), forced]) == [-0.5, 0.0]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 700))
def test_never_a_gain_and_never_less_than_minus_one(most, cache, count):
    penalty = OverlongPenalty(max(most, cache), min(most, cache))
    here, further = penalties(penalty, [sampled(count), sampled(count + 1)])
    assert -1 <= further <= here <= 0


def test_as_a_reward():
    penalty = OverlongPenalty(20, 4, weight=0.5)
    assert isinstance(penalty, Reward)
    episode = sampled(18)
    asyncio.run(score_episodes([penalty], [episode]))
    assert episode.rewards == [NamedReward("overlong", -0.5, 0.5)]
    assert episode.reward == -0.25


@pytest.mark.parametrize(("most", "cache"), [(10, 0), (10, 11), (0, 0), (-5, -6)])
def test_lengths_that_leave_no_room(most, cache):
    with pytest.raises(
        ConfigError, match=rf"cache_length is {cache} and max_length {most}; expected 1 <= cache"
    ):
        OverlongPenalty(most, cache)
