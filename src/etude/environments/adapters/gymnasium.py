"""Gymnasium's environments, where observations and actions are texts or can be written as such.

    GymnasiumEnvironment("FrozenLake-v1", inner, actions=["left", "down", "right", "up"], is_slippery=False)

Each episode makes an environment and resets it with the row's column `seed`, or else the episode's own, and
with the row as `options`. Episodes that are compared with one another (a group's) begin alike only by such a
column.

Needs the extra `gymnasium` where an environment is named; a function that makes one brings its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etude.environments.adapters.calls import ForeignCalls
from etude.environments.adapters.instance import Instance, InstanceEnvironment
from etude.environments.adapters.stepping import Step, SteppedInstance, StepReward
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, EnvironmentSetupError
from etude.rewards.scores import check_weight
from etude.tools.contract import to_text

_COLOURED = re.compile("\x1b\\[[0-9;]*m(.*?)\x1b\\[0m", re.DOTALL)

Parse = Callable[[str], Any]
Render = Callable[[Any], str]


class GymnasiumEnvironment(InstanceEnvironment):
    """Plays Gymnasium's environments by text.

    Args:
        make: an environment's id, or a function that makes one, without arguments.
        inner: what plays. Turns have to end, by an end-of-sequence token or one of `stop_strings`, and its
            `max_turns` has to leave room for the steps.
        parse: a turn's text to an action; a `ValueError` tells the model what was wrong. By default the names
            in `actions`, else for a discrete space its numbers, else the text itself, stripped.
        actions: names of a discrete space's actions, in order, or a mapping from names to actions.
        render: an observation to text. By default what the environment renders where its `render_mode` is
            "ansi" (what it colours in brackets), else the observation itself, arrays as JSON.
        name: of the steps' reward; by default the environment's id.
        weight: of the steps' rewards in the episode's.
        invalid_reward: of a turn that is no action.
        timeout, max_instances: see `InstanceEnvironment`.
        options: of `gymnasium.make`, where an id is given.
    """

    def __init__(
        self,
        make: str | Callable[[], Any],
        inner: TextEnvironment,
        *,
        parse: Parse | None = None,
        actions: Sequence[str] | Mapping[str, Any] | None = None,
        render: Render | None = None,
        name: str | None = None,
        weight: float = 1.0,
        invalid_reward: float = 0.0,
        timeout: float | None = 60.0,
        max_instances: int | None = None,
        **options: Any,
    ) -> None:
        if parse is not None and actions is not None:
            raise ConfigError("parse and actions both say what an action is; pass one of them")
        if isinstance(make, str):
            made_by, make = make, functools.partial(_gymnasium().make, make, **options)
        elif options:
            raise ConfigError(f"{', '.join(options)}: options are for an id; make the environment with them")
        else:
            made_by = getattr(make, "__name__", type(make).__name__)
        super().__init__(inner, name=made_by, timeout=timeout, max_instances=max_instances)
        self.make_foreign = make
        self.parse = parse
        self.actions = actions if actions is None or isinstance(actions, Mapping) else _numbered(actions)
        self.render = render
        self.rewards = StepReward(name or made_by, check_weight(weight, name or made_by), invalid_reward)

    async def make(self, task: Mapping[str, Any], calls: ForeignCalls) -> Instance:
        return _Gym(await calls(self.make_foreign), self, calls)


class _Gym(SteppedInstance):
    def __init__(self, gym: Any, environment: GymnasiumEnvironment, calls: ForeignCalls) -> None:
        super().__init__(environment.inner, environment.rewards)
        self.gym = gym
        self.environment = environment
        self.calls = calls

    async def reset(self, task: Mapping[str, Any], seed: int) -> str:
        seed = task.get("seed", seed)
        observation, _ = await self.calls(self.gym.reset, seed=seed, options=dict(task))
        return await self._text(observation)

    def parse(self, text: str) -> Any:
        if self.environment.parse is not None:
            return self.environment.parse(text)
        if self.environment.actions is not None:
            return _named(text, self.environment.actions)
        space = self.gym.action_space
        return _counted(text, space) if hasattr(space, "n") and hasattr(space, "start") else text.strip()

    async def step(self, action: Any) -> Step:
        observation, reward, terminated, truncated, _ = await self.calls(self.gym.step, action)
        return Step(await self._text(observation), float(reward), bool(terminated), bool(truncated))

    async def _text(self, observation: Any) -> str:
        if self.environment.render is not None:
            return self.environment.render(observation)
        if self.gym.render_mode == "ansi":
            return _COLOURED.sub(r"[\1]", to_text(await self.calls(self.gym.render)))
        return to_text(observation)

    async def close(self) -> None:
        await self.calls.close(self.gym.close)


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _named(text: str, actions: Mapping[str, Any]) -> Any:
    action = text.strip()
    if action not in actions:
        raise ValueError(f"{action[:40]!r} is no action; expected {', '.join(actions)}")
    return actions[action]


def _counted(text: str, space: Any) -> int:
    """An action of a discrete space, by its number."""
    first, last = int(space.start), int(space.start + space.n) - 1
    try:
        action = int(text)
    except ValueError:
        action = first - 1
    if not first <= action <= last:
        raise ValueError(f"{text.strip()[:40]!r} is no action; expected a number from {first} to {last}")
    return action


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise EnvironmentSetupError(
            "Gymnasium isn't installed; pip install 'etude[gymnasium]', or pass a function that makes the "
            "environment"
        ) from error
    return gymnasium
