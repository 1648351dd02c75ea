import asyncio
import math
import threading

import pytest

from etude.errors import ConfigError, RewardError
from etude.rewards.function import FunctionReward, reward
from etude.rewards.mixture import score_episodes
from etude.types import Episode, NamedReward, Segment


def answered(*texts):
    return [Episode(segments=[Segment("prompt", "p", []), Segment("model", text, [])]) for text in texts]


def length(completions):
    return [len(text) for text in completions]


def vowels(completions):
    return [text.count("a") if text else None for text in completions]


def test_each_reward_keeps_its_name_and_weight():
    episodes = answered("banana", "fig", "")
    asyncio.run(score_episodes([FunctionReward(length, weight=0.5), FunctionReward(vowels)], episodes))
    assert episodes[0].rewards == [NamedReward("length", 6.0, 0.5), NamedReward("vowels", 3.0, 1.0)]
    assert [episode.reward for episode in episodes] == [6.0, 1.5, 0.0]
    assert episodes[2].rewards[1].value is None


def test_rewards_run_at_the_same_time():
    barrier = threading.Barrier(2, timeout=5)

    def first(completions):
        barrier.wait()
        return length(completions)

    def second(completions):
        barrier.wait()
        return length(completions)

    episodes = answered("a")
    asyncio.run(score_episodes([FunctionReward(first), FunctionReward(second)], episodes))
    assert episodes[0].reward == 2.0


def test_nothing_changes_if_one_fails():
    cancelled = []

    async def slow(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    def broken(completions):
        return [1.0, math.inf]

    episodes = answered("a", "b")
    with pytest.raises(RewardError, match="'broken' returned inf for episode 1"):
        asyncio.run(
            score_episodes([FunctionReward(length), FunctionReward(slow), FunctionReward(broken)], episodes)
        )
    assert [episode.rewards for episode in episodes] == [[], []]
    assert cancelled == [True]


def test_scores_of_foreign_rewards_are_checked():
    class Short:
        name, weight = "short", 1.0

        async def __call__(self, episodes):
            return [1.0]

    episodes = answered("a", "b")
    with pytest.raises(RewardError, match="'short' returned 1 scores for 2 episodes"):
        asyncio.run(score_episodes([Short()], episodes))
    assert episodes[0].rewards == []


def test_names_are_unique():
    with pytest.raises(RewardError, match="two rewards are named 'length'"):
        asyncio.run(score_episodes([FunctionReward(length), FunctionReward(length)], answered("a")))
    asyncio.run(score_episodes([FunctionReward(length), FunctionReward(length, "other")], answered("a")))


def test_nobody_is_paid_twice():
    episodes = answered("a")
    asyncio.run(score_episodes([FunctionReward(length)], episodes))
    with pytest.raises(RewardError, match="episode 0 already has a reward 'length'"):
        asyncio.run(score_episodes([FunctionReward(length)], episodes))
    assert len(episodes[0].rewards) == 1


def test_no_rewards():
    episodes = answered("a")
    asyncio.run(score_episodes([], episodes))
    assert episodes[0].rewards == []


def two_turns():
    """Sampled tokens at 3, 4 and 7; the second turn begins with a forced one."""
    return Episode(
        segments=[
            Segment("prompt", "p", [0, 0, 0]),
            Segment("model", "<request>", [1, 2], policy_version=0),
            Segment("tool", "2", [3]),
            Segment("model", "=", [4]),
            Segment("model", "2", [5], policy_version=0),
        ]
    )


def test_rewards_of_turns_and_tokens_sit_where_they_belong():
    @reward(level="turn", weight=0.5)
    def steps(turns):
        return [[-1.0, 2.0], [None, 3.0]]

    @reward(level="token")
    def words(token_ids):
        return [[1.0, None, 0.25], None]

    episodes = [two_turns(), two_turns()]
    asyncio.run(score_episodes([steps, FunctionReward(length), words], episodes))
    assert episodes[0].rewards == [
        NamedReward("steps", -1.0, 0.5, 4),
        NamedReward("steps", 2.0, 0.5, 7),
        NamedReward("length", 11.0),
        NamedReward("words", 1.0, 1.0, 3),
        NamedReward("words", 0.25, 1.0, 7),
    ]
    assert episodes[1].rewards == [
        NamedReward("steps", 3.0, 0.5, 7),
        NamedReward("length", 11.0),
        NamedReward("words", None),
    ]
    assert [episode.reward for episode in episodes] == [0.5 * (-1 + 2) + 11 + 1.25, 0.5 * 3 + 11]
    assert episodes[0].reward_totals == {
        "steps": NamedReward("steps", 1.0, 0.5),
        "length": NamedReward("length", 11.0),
        "words": NamedReward("words", 1.25),
    }
    assert episodes[1].reward_totals["words"].value is None


@pytest.mark.parametrize("scores", [[None, None], None])
def test_a_reward_that_applies_nowhere_leaves_its_name(scores):
    episode = two_turns()
    asyncio.run(score_episodes([FunctionReward(lambda turns: [scores], "steps", 0.5, "turn")], [episode]))
    assert episode.rewards == [NamedReward("steps", None, 0.5)]
    assert episode.reward == 0.0


def test_foreign_rewards_say_their_level():
    class Steps:
        name, weight, level = "steps", 1.0, "turn"

        async def __call__(self, episodes):
            return [[1.0] * episode.turns for episode in episodes]

    episode = two_turns()
    asyncio.run(score_episodes([Steps()], [episode]))
    assert [reward.position for reward in episode.rewards] == [4, 7]
    wrong = Steps()
    wrong.level = "step"
    with pytest.raises(ConfigError, match="the level of reward 'steps' is 'step'"):
        asyncio.run(score_episodes([wrong], [two_turns()]))
