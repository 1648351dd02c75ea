"""Several environments as one: each task says in which of them it is played.

    env = MixedEnvironment({"calculator": arithmetic, "translation": translation})
    env.run([{"environment": "calculator", "prompt": "What is 2*3?", "answer": 6}, …])

A task's column `environment` names it. The environment plays the task and scores the episode as if it were
alone: tools, prompt, rewards and limits are its own. What they share is the model: one tokenizer, one
sampler.

Not covered: which tasks come when (`trainers.tasks`), and numbers by environment
(`trainers.episode_metrics`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.environments.orchestrator import gather_all
from etude.environments.running import Runs, Seeds
from etude.environments.traits import (
    check_environment,
    max_length_of,
    parts_of,
    prompt_of,
    tokenizer_of,
)
from etude.errors import ConfigError, DataError, EnvironmentSetupError
from etude.protocols import Environment, Sampler
from etude.sampling.local import LocalSampler
from etude.types import Episode

COLUMN = "environment"  # of the tasks
SuccessReward = float | Mapping[str, float]  # that makes an episode a success: of all, or by environment
_TAKEN = ("rewards", "stop", "time", "validation", "sampler", "ppo", "objective", "env")  # names of metrics


class MixedEnvironment(Runs):
    """Plays each task in the environment that its column `environment` names.

    Args:
        environments: by name; any that can play and score. Metrics are reported under these names.
        weights: how often a trainer plays tasks of each, relative to the others; None: in proportion to their
            tasks. An environment of weight 0 is only evaluated.
        default: the environment of tasks that name none.
        sampler: what plays where no trainer brings its own; a local sampler over the environments' model by
            default.
        slots: episodes that this local sampler decodes at once, at most.
        cache_bytes: what its keys and values may take, such as "2GiB"; half of the free memory by default.
        seed: of the episodes' random streams; `set_seed` decides it by default.

    Attributes:
        tokenizer: the one of the environments that have one; None if none has.
        max_length: the largest of the environments', by which the sampler's memory is planned; each of them
            keeps to its own. None if one of them goes up to the model's own limit.

    Raises:
        EnvironmentSetupError: a name or a weight is no good, or the tokenizers differ.
    """

    def __init__(
        self,
        environments: Mapping[str, Environment],
        weights: Mapping[str, float] | None = None,
        *,
        default: str | None = None,
        sampler: Sampler | None = None,
        slots: int = 32,
        cache_bytes: int | str | None = None,
        seed: int | None = None,
    ) -> None:
        _check_names(environments, default)
        if weights is not None:
            _check_weights(weights, environments)
        self.environments = dict(environments)
        self.weights = weights
        self.default = default
        self.tokenizer = _one_tokenizer(self.environments)
        lengths = [max_length_of(environment) for environment in self.environments.values()]
        self.max_length = None if None in lengths else max(length for length in lengths if length)
        self.slots = slots
        self.cache_bytes = cache_bytes
        self.next_seed = Seeds(seed)
        self._sampler = sampler

    def name_of(self, task: Mapping[str, Any]) -> str:
        """The environment that plays a task.

        Raises:
            DataError: the task names none, or one that isn't there.
        """
        name = task.get(COLUMN)
        if name is None:
            name = self.default
        if name is None:
            raise DataError(
                f"a task needs a column {COLUMN!r} that says who plays it: {self._known}; this one has "
                f"{', '.join(task) or 'nothing'}. Or choose a default="
            )
        if not isinstance(name, str) or name not in self.environments:
            raise DataError(f"a task's {COLUMN} is {name!r}; expected {self._known}")
        return name

    @property
    def _known(self) -> str:
        return " or ".join(map(repr, self.environments))

    async def play(self, task: Mapping[str, Any], sampler: Sampler, *, seed: int) -> Episode:
        """Play one episode, in the environment that the task names."""
        name = self.name_of(task)
        episode = await self.environments[name].play(task, sampler, seed=seed)
        if episode.environment != name:  # the task named none, or the environment keeps no rows
            episode.task = {**task, **episode.task, COLUMN: name}
        return episode

    async def score(self, episodes: Sequence[Episode]) -> None:
        """Let each environment score its own episodes."""
        own: dict[str, list[Episode]] = {}
        for episode in episodes:
            own.setdefault(self.name_of(episode.task), []).append(episode)
        await gather_all([self.environments[name].score(those) for name, those in own.items()])

    def prompt_text(self, task: Mapping[str, Any]) -> str | None:
        """What the task's environment begins with; None where that isn't known before it plays."""
        return prompt_of(self.environments[self.name_of(task)], task)

    @property
    def model(self) -> nn.Module | None:
        """What plays in the environments, if they have a model.

        Raises:
            EnvironmentSetupError: they have different ones.
        """
        models = [getattr(environment, "model", None) for environment in self.environments.values()]
        different = {id(model): model for model in models if model is not None}
        if len(different) > 1:
            raise EnvironmentSetupError(
                "the environments have different models, and a mixed one plays with one; give them the same, "
                "or pass sampler="
            )
        return next(iter(different.values()), None)

    @property
    def sampler(self) -> Sampler:
        """The sampler that all environments share; a local one is made when it is first needed."""
        if self._sampler is None:
            model, tokenizer = self.model, self.tokenizer
            if model is None or tokenizer is None:
                raise EnvironmentSetupError(
                    "none of the environments has a model and a tokenizer; give them some, or pass sampler="
                )
            self._sampler = LocalSampler(
                model,
                tokenizer,
                slots=self.slots,
                max_length=self.max_length,
                cache_bytes=self.cache_bytes,
            )
        return self._sampler


def by_environment(episodes: Sequence[Episode], environments: Collection[str]) -> dict[str, list[Episode]]:
    """The episodes of each of these environments in which some were played."""
    own: dict[str, list[Episode]] = {name: [] for name in environments}
    for episode in episodes if own else ():
        own[episode.environment].append(episode)
    return {name: those for name, those in own.items() if those}


def succeeds(episode: Episode, success_reward: SuccessReward) -> bool:
    """Whether its reward reaches that, or that of its environment."""
    if isinstance(success_reward, Mapping):
        return episode.reward >= success_reward[episode.environment]
    return episode.reward >= success_reward


def check_success(success_reward: SuccessReward, environment: Environment | None) -> None:
    """Raises `ConfigError` where it is by environment, and not by those that there are."""
    parts = parts_of(environment)
    if isinstance(success_reward, Mapping) and set(success_reward) != set(parts):
        named = " and ".join(map(repr, parts)) or "none: the environment isn't mixed"
        raise ConfigError(
            f"success_reward is of {', '.join(success_reward)}; expected a number, or one for each of {named}"
        )


def _check_names(environments: Mapping[str, Environment], default: str | None) -> None:
    if not environments:
        raise EnvironmentSetupError("there are no environments to mix; pass {name: environment, …}")
    for name, environment in environments.items():
        check_environment(environment)
        if not isinstance(name, str) or not name or "/" in name or name in _TAKEN:
            raise EnvironmentSetupError(
                f"an environment is named {name!r}; metrics are called after it: expected a name without / "
                f"that isn't one of {', '.join(_TAKEN)}"
            )
        if parts_of(environment):
            raise EnvironmentSetupError(f"{name!r} is mixed itself; put its environments beside the others")
    if default is not None and default not in environments:
        raise EnvironmentSetupError(
            f"default is {default!r}; expected {' or '.join(map(repr, environments))}"
        )


def _check_weights(weights: Mapping[str, float], environments: Mapping[str, Environment]) -> None:
    if set(weights) != set(environments):
        raise EnvironmentSetupError(
            f"weights are of {', '.join(weights) or 'nothing'}; expected one for each of "
            f"{', '.join(environments)}"
        )
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise EnvironmentSetupError(f"the weight of {name!r} is {weight}; expected a number >= 0")
    if not any(weights.values()):
        raise EnvironmentSetupError("all weights are 0, so there is nothing to play; give one more than that")


def _one_tokenizer(environments: Mapping[str, Environment]) -> PreTrainedTokenizerBase | None:
    found = {name: tokenizer_of(environment) for name, environment in environments.items()}
    tokenizers = {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}
    first, *others = tokenizers or ("",)
    for name in others:
        same = tokenizers[name] is tokenizers[first]
        if not same and tokenizers[name].get_vocab() != tokenizers[first].get_vocab():
            raise EnvironmentSetupError(
                f"{name!r} has another tokenizer than {first!r}, and one model plays in both; give them the "
                "model's own"
            )
    return tokenizers.get(first)
