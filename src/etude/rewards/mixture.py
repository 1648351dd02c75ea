"""Several rewards on the same episodes: a weighted sum, each of them kept under its name."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from etude.errors import RewardError
from etude.protocols import Reward
from etude.rewards.scores import check_scores
from etude.types import Episode, NamedReward


async def score_episodes(rewards: Sequence[Reward], episodes: Sequence[Episode]) -> None:
    """Score with all rewards at once, then append each score to its episode as a terminal reward.

    All or nothing: if a reward fails, the others are cancelled and no episode has been changed.

    Raises:
        RewardError: two rewards have one name, an episode has been scored under that name before, or a
            score is missing, NaN, infinite or not a number.
    """
    names = [reward.name for reward in rewards]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise RewardError(
            f"two rewards are named {repeated[0]!r}; expected a name for each: pass name=… to one of them"
        )
    for index, episode in enumerate(episodes):
        if before := {reward.name for reward in episode.rewards} & set(names):
            raise RewardError(f"episode {index} already has a reward {min(before)!r}; score episodes once")

    tasks = [asyncio.ensure_future(_scores(reward, episodes)) for reward in rewards]
    try:
        scores_RN = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for reward, scores_N in zip(rewards, scores_RN, strict=True):
        for episode, score in zip(episodes, scores_N, strict=True):
            episode.rewards.append(NamedReward(reward.name, score, reward.weight))


async def _scores(reward: Reward, episodes: Sequence[Episode]) -> list[float | None]:
    return check_scores(await reward(episodes), reward.name, episodes)
