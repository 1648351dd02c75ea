"""Several rewards on the same episodes: a weighted sum, each of them kept under its name."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from etude.errors import RewardError
from etude.protocols import Reward
from etude.rewards.levels import Level, Score, level_of, named_rewards
from etude.rewards.scores import check_scores
from etude.types import Episode


async def score_episodes(rewards: Sequence[Reward], episodes: Sequence[Episode]) -> None:
    """Score with all rewards at once, then append each score to its episode: terminal, or where it belongs.

    All or nothing: if a reward fails, the others are cancelled and no episode has been changed.

    A reward at the level "turn" or "token" appends one for each turn or token to which it applies. Every
    reward leaves its name in every episode, if only with a value of None.

    Raises:
        RewardError: two rewards have one name, an episode has been scored under that name before, or a
            score is missing, NaN, infinite or not a number.
    """
    levels = [level_of(reward) for reward in rewards]
    names = [reward.name for reward in rewards]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise RewardError(
            f"two rewards are named {repeated[0]!r}; expected a name for each: pass name=… to one of them"
        )
    for index, episode in enumerate(episodes):
        if before := {reward.name for reward in episode.rewards} & set(names):
            raise RewardError(f"episode {index} already has a reward {min(before)!r}; score episodes once")

    tasks = [asyncio.ensure_future(_scores(*pair, episodes)) for pair in zip(rewards, levels, strict=True)]
    try:
        scores_RN = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for reward, level, scores_N in zip(rewards, levels, scores_RN, strict=True):
        for episode, score in zip(episodes, scores_N, strict=True):
            episode.rewards += named_rewards(score, reward.name, reward.weight, level, episode)


async def _scores(reward: Reward, level: Level, episodes: Sequence[Episode]) -> list[Score]:
    return check_scores(await reward(episodes), reward.name, episodes, level)
