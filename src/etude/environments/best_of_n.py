"""Best of n in an environment: play each task several times, tools and all, and keep the best episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from etude.data.selection import best_first
from etude.environments.orchestrator import play_episodes
from etude.environments.running import task_rows
from etude.environments.text import TextEnvironment
from etude.environments.traits import sampler_of, seeds_of
from etude.errors import ConfigError
from etude.math.kl import best_of_n_kl
from etude.protocols import Environment, Sampler
from etude.runtime.loop import run_sync
from etude.types import Episode


class BestOfN:
    """Plays each task `n` times and returns the best, by the environment's rewards.

    The n episodes share their prompt's keys and values, and all tasks are played at once.

    Args:
        environment: with rewards; what kind they are doesn't matter.
        n: episodes per task.
        n_candidates: how many of them are returned per task, best first.
        sampler: what plays; the environment's own by default.
    """

    def __init__(
        self, environment: Environment, n: int = 4, n_candidates: int = 1, sampler: Sampler | None = None
    ) -> None:
        if not 1 <= n_candidates <= n:
            raise ConfigError(f"n_candidates is {n_candidates} and n {n}; expected 1 <= n_candidates <= n")
        if _scores_nothing(environment):
            raise ConfigError("the environment has no rewards, so none of n is best; give it rewards=")
        self.environment = environment
        self.sampler = sampler
        self.next_seed = seeds_of(environment)
        self.n = n
        self.n_candidates = n_candidates

    @property
    def kl_bound(self) -> float:
        """Nats by which the best one's distribution is from the model's own at most, see `best_of_n_kl`."""
        return best_of_n_kl(self.n)

    def run(self, tasks: Sequence[str | Mapping[str, Any]], **columns: Any) -> list[list[Episode]]:
        """The best episodes of each task, best first, scored; fewer where more of them failed on our side.

        Args:
            tasks: prompts, or rows that have one.
            columns: what the rewards need, one value per task, or one for all.
        """
        rows = [row for row in task_rows(tasks, columns) for _ in range(self.n)]
        seeds = [self.next_seed() for _ in rows]
        sampler = sampler_of(self.environment, self.sampler)
        episodes = run_sync(play_episodes(self.environment, rows, sampler, seeds))
        groups = [episodes[start : start + self.n] for start in range(0, len(episodes), self.n)]
        return [best_first(group)[: self.n_candidates] for group in groups]


def _scores_nothing(environment: Environment) -> bool:
    if not isinstance(environment, TextEnvironment):
        return False
    return not environment.rewards and type(environment).score is TextEnvironment.score
