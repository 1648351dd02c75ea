"""Environments of TRL 1.x's duck type: an object with `reset(**row)`, methods as tools, and `get_reward()`.

    class Counter:
        def reset(self, **row):
            self.total = 0                       # may return text, which is added to the prompt

        def add(self, number: int) -> int:
            \"\"\"Add a number.

            Args:
                number: what to add.
            \"\"\"
            self.total += number
            return self.total

        def get_reward(self) -> float:
            return float(self.total == 3)

    DuckEnvironment(Counter, TextEnvironment(model, tokenizer, max_turns=4))

As in TRL, public methods are tools, and reward functions may ask for `environments`, the objects. An object
is made for each episode, and a method `close` is called at its end and is no tool: TRL keeps its objects, and
shows the model every method. The column `environment` says who plays and isn't passed to `reset`.

Not covered: `reset` that returns images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etude.environments.adapters.calls import ForeignCalls
from etude.environments.adapters.instance import Instance, InstanceEnvironment, extend_prompt
from etude.environments.mixed import COLUMN, MixedEnvironment
from etude.environments.text import TextEnvironment
from etude.errors import EnvironmentSetupError, InstanceError
from etude.protocols import Sampler
from etude.rewards.scores import check_scores, check_weight
from etude.types import Episode, NamedReward, StopReason

OWN = ("reset", "get_reward", "close")  # methods that are ours to call


class DuckEnvironment(InstanceEnvironment):
    """Plays in objects of TRL's duck type.

    Args:
        factory: makes one, without arguments: a class or a function.
        inner: what plays; its tools are there beside the object's.
        name: of the reward, by default the object's class.
        weight: of what `get_reward` returns, in the episode's reward.
        timeout, max_instances: see `InstanceEnvironment`.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        inner: TextEnvironment,
        *,
        name: str | None = None,
        weight: float = 1.0,
        timeout: float | None = 60.0,
        max_instances: int | None = None,
    ) -> None:
        if not callable(factory):
            raise EnvironmentSetupError(
                f"factory is {factory!r}; expected a class or function that makes an environment"
            )
        made_by: str = getattr(factory, "__name__", type(factory).__name__)
        super().__init__(inner, name=made_by, timeout=timeout, max_instances=max_instances)
        self.factory = factory
        self.reward_name = name
        self.weight = check_weight(weight, name or made_by)
        self._played: dict[int, tuple[Episode, Mapping[str, Any]]] = {}  # until they are scored

    async def make(self, task: Mapping[str, Any], calls: ForeignCalls) -> Instance:
        return _Duck(await calls(self.factory), self, calls)

    async def play(self, task: Mapping[str, Any], sampler: Sampler, *, seed: int) -> Episode:
        episode = await super().play(task, sampler, seed=seed)
        if episode.stop is StopReason.INFRASTRUCTURE:
            self._played.pop(id(episode), None)  # nobody will score it
        return episode

    async def score(self, episodes: Sequence[Episode]) -> None:
        """Append the inner environment's rewards; their functions may ask for `environments`."""
        tasks = [episode.task for episode in episodes]
        for episode in episodes:
            _, episode.task = self._played.pop(id(episode), (episode, episode.task))
        try:
            await self.inner.score(episodes)
        finally:
            for episode, task in zip(episodes, tasks, strict=True):
                episode.task = task

    def keep(self, episode: Episode, task: Mapping[str, Any]) -> None:
        """Keep the task that rewards are to see, until the episode is scored."""
        self._played[id(episode)] = (episode, task)


def duck_environments(
    factories: Mapping[str, Callable[[], Any]],
    inner: TextEnvironment,
    weights: Mapping[str, float] | None = None,
    **settings: Any,
) -> MixedEnvironment:
    """TRL's dict of factories: each task is played by the one that its column `environment` names.

    Args:
        factories: by name.
        inner: what plays, in each of them.
        weights: how often a trainer plays tasks of each, see `MixedEnvironment`.
        settings: of each `DuckEnvironment`.
    """
    environments = {name: DuckEnvironment(make, inner, **settings) for name, make in factories.items()}
    return MixedEnvironment(environments, weights, slots=inner.slots, cache_bytes=inner.cache_bytes)


class _Duck(Instance):
    def __init__(self, duck: Any, environment: DuckEnvironment, calls: ForeignCalls) -> None:
        # On the class: looking at the object would call its properties.
        methods = dict(inspect.getmembers(type(duck), inspect.isfunction))
        if "reset" not in methods:
            raise EnvironmentSetupError(
                f"a {type(duck).__name__} has no method reset; TRL's environments have one that takes a row"
            )
        public = [name for name in methods if not name.startswith("_") and name not in OWN]
        self.duck = duck
        self.own = methods.keys() & set(OWN)
        self.environment = environment
        self.calls = calls
        self.tools = {name: calls.tool(getattr(duck, name), name) for name in public}

    async def open(self, task: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        row = {name: value for name, value in task.items() if name != COLUMN}
        said = await self.calls(self.duck.reset, **row)
        if said is not None and not isinstance(said, str):
            raise InstanceError(f"{type(self.duck).__name__}.reset returned {said!r}; expected text or None")
        return extend_prompt(task, said)

    async def finish(self, episode: Episode) -> None:
        if "get_reward" in self.own:
            name = self.environment.reward_name or type(self.duck).__name__
            [value] = check_scores([await self.calls(self.duck.get_reward)], name, [episode])
            episode.rewards.append(NamedReward(name, value, self.environment.weight))
        self.environment.keep(episode, {**episode.task, "environments": self.duck})

    async def close(self) -> None:
        if "close" in self.own:
            await self.calls.close(self.duck.close)
