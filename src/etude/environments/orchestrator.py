"""Many episodes at once.

Every episode is a task of the event loop: while one waits for its tool, the sampler decodes the others.
There is no barrier between turns. What fails on our side stays beside what succeeded, as data; only when
nothing succeeded does the failure itself come out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etude.errors import SamplerError
from etude.protocols import Environment, Sampler
from etude.types import Episode, StopReason


async def play_episodes(
    environment: Environment,
    tasks: Sequence[Mapping[str, Any]],
    sampler: Sampler,
    seeds: Sequence[int],
    on_episode: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """Play one episode per task, in order of the tasks, and score them.

    Args:
        seeds: one per task, each of its own counter-based stream.
        on_episode: told of each episode as it ends, before it is scored.

    Raises:
        SamplerError: every single episode failed on our side.
    """

    async def play(task: Mapping[str, Any], seed: int) -> Episode:
        episode = await environment.play(task, sampler, seed=seed)
        if on_episode is not None:
            on_episode(episode)
        return episode

    episodes = await gather_all([play(task, seed) for task, seed in zip(tasks, seeds, strict=True)])
    played = [episode for episode in episodes if episode.stop is not StopReason.INFRASTRUCTURE]
    if episodes and not played:
        raise SamplerError(f"all {len(episodes)} episodes failed; the first: {episodes[0].error}")
    await environment.score(played)
    return episodes


async def gather_all(coroutines: Sequence[Any]) -> list[Any]:
    """Like `asyncio.gather`, but a failure cancels the rest and waits for it to clean up."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
