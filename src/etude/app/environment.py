"""A model in its environment, as the command line describes them: where every command that plays starts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from inspect import Parameter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from etude.app.arguments import ENVIRONMENTS, EnvironmentArguments, FixedModelArguments, default_of
from etude.app.mixed_arguments import PlayArguments
from etude.app.references import load_object
from etude.environments.mixed import MixedEnvironment
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError
from etude.models.loading import load_tokenizer
from etude.models.reward_adapter import RewardAdapter
from etude.models.reward_model import kind_in
from etude.rewards.adapter import AdapterReward
from etude.rewards.model import ModelReward
from etude.rewards.process import ProcessReward


@dataclass(frozen=True)
class EnvironmentCode:
    """The code that options name, loaded. It comes before the model: mistakes in it show at once.

    Attributes:
        settings: the options.
        kind: makes the environment from a model, a tokenizer and options by name.
        tools, rewards, reward_fn: as `TextEnvironment` takes them.
    """

    settings: EnvironmentArguments
    kind: Callable[..., Any]
    tools: list[Any]
    rewards: list[Any]
    reward_fn: Any

    @classmethod
    def load(cls, settings: EnvironmentArguments) -> EnvironmentCode:
        """Raises `ConfigError` for a reference that leads nowhere, or what the environment doesn't take."""
        code = cls(
            settings,
            kind=_load_kind(settings.environment),
            tools=[load_object(reference, "etude.tools") for reference in settings.tools],
            rewards=[load_object(reference, "etude.rewards") for reference in settings.rewards],
            reward_fn=load_object(settings.reward_fn, "etude.rewards") if settings.reward_fn else None,
        )
        code.options()
        return code

    def environment(self, model: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> TextEnvironment:
        """The environment around a model.

        Args:
            options: of the environment, besides what the settings say.

        Raises:
            ConfigError: nothing scores its episodes, or it doesn't take an option.
        """
        settings, rewards = self.settings, list(self.rewards)
        if settings.reward_adapter is not None:
            rewards.append(AdapterReward(RewardAdapter.load(model, settings.reward_adapter)))
        rewards += [_reward_of(place) for place in settings.reward_models]
        given, takes = {**self.options(rewards), **options}, parameters_of(self.kind)
        if takes is not None and (unknown := [name for name in options if name not in takes]):
            raise ConfigError(
                f"the environment {settings.environment} takes no {unknown[0]}, which this command sets; let "
                "its __init__ take **options, and hand them to the class it inherits from"
            )
        made = self.kind(model, tokenizer, **given)
        if isinstance(made, TextEnvironment) and not (made.rewards or _scores(made)):
            raise ConfigError(
                f"the environment {settings.environment} has no rewards of its own; name code that gives a "
                "score with reward or reward_fn, or a reward_model or reward_adapter"
            )
        return made

    def options(self, rewards: Sequence[Any] | None = None) -> dict[str, Any]:
        """What the settings say, by the names of the environment's parameters. What isn't set is left to it.

        Args:
            rewards: all of them; those that are code by default.

        Raises:
            ConfigError: the environment doesn't take what is set, or it is set twice.
        """
        settings, takes = self.settings, parameters_of(self.kind)
        values = {
            **{parameter: getattr(settings, option) for parameter, option in _OPTIONS.items()},
            "tools": self.tools,
            "rewards": self.rewards if rewards is None else list(rewards),
            "reward_fn": self.reward_fn,
            "prompt": settings.prompt_text(),
        }
        given = {name: value for name, value in values.items() if value != _DEFAULTS[_OPTIONS[name]]}
        extra = settings.environment_kwargs
        if twice := [name for name in extra if name in given]:
            raise ConfigError(f"environment_kwargs has {twice[0]}, which is an option, too; give one of them")
        if takes is not None and (unknown := [name for name in (*given, *extra) if name not in takes]):
            near = difflib.get_close_matches(unknown[0], takes, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(takes))}"
            name = _OPTIONS.get(unknown[0], unknown[0])
            raise ConfigError(f"the environment {settings.environment} takes no {name}; {hint}")
        return {**given, **extra}


# An environment's parameters, and the options that give them.
_OPTIONS = {
    "tools": "tools",
    "rewards": "reward",
    "reward_fn": "reward_fn",
    "prompt": "prompt",
    "max_turns": "max_turns",
    "max_tool_reponse": "max_tool_response",
    "max_tool_response_tokens": "max_tool_response_tokens",
    "max_tool_calls": "max_tool_calls",
    "max_length": "max_length",
    "tool_timeout": "tool_timeout",
    "generation_kwargs": "generation",
}
_DEFAULTS = {setting.name: default_of(setting) for setting in fields(EnvironmentArguments)}


def parameters_of(kind: Callable[..., Any]) -> set[str] | None:
    """What can be passed by name; None where everything can.

    A class that takes `**options` hands them to the class it inherits from.
    """
    makers = [kind]
    if inspect.isclass(kind):
        makers = [vars(each)["__init__"] for each in kind.__mro__ if "__init__" in vars(each)]
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    names: set[str] = set()
    for maker in makers:
        parameters = inspect.signature(maker).parameters.values()
        names |= {parameter.name for parameter in parameters if parameter.kind in named}
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            return names - {"self", "model", "tokenizer"}
    return None


def _scores(environment: TextEnvironment) -> bool:
    """It scores its episodes itself."""
    return type(environment).score is not TextEnvironment.score


def _load_kind(name: str) -> Callable[..., Any]:
    if name not in ENVIRONMENTS and ":" not in name:
        near = difflib.get_close_matches(name, ENVIRONMENTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(ENVIRONMENTS)}"
        raise ConfigError(
            f"there is no environment {name!r}; {hint}; for your own code file.py:Class or "
            "package.module:Class"
        )
    kind = load_object(ENVIRONMENTS.get(name, name))
    if not callable(kind):
        raise ConfigError(f"{name} is {kind!r}; expected a class of environments")
    made: Callable[..., Any] = kind
    return made


def build_environment(
    load_model: Callable[..., Any],
    model_arguments: FixedModelArguments,
    episodes: PlayArguments,
    seed: int,
) -> TextEnvironment | MixedEnvironment:
    """The environment, or several, around the model (its `model`) that it has loaded, and the `tokenizer`.

    Call it after the data are read: mistakes in them, and in the code that `episodes` names, show before a
    model is loaded.

    Args:
        load_model: from a name and what the arguments say, such as `load_causal_lm`.
        seed: of what starts at random in the model (a value head, an adapter), and of the episodes.
    """
    codes = {name: EnvironmentCode.load(part.episodes) for name, part in episodes.parts.items()}
    alone = None if codes else EnvironmentCode.load(episodes)
    set_seed(seed)
    tokenizer = load_tokenizer(**model_arguments.tokenizer_place)
    model = load_model(
        model_arguments.model_name_or_path,
        peft_config=model_arguments.peft_config(),
        **model_arguments.loading,
    )
    if alone is not None:
        return alone.environment(model, tokenizer)
    parts = {name: code.environment(model, tokenizer) for name, code in codes.items()}
    return MixedEnvironment(parts, episodes.weights)


def _reward_of(place: str) -> ModelReward | ProcessReward:
    name = Path(place).name
    if kind_in(place) == "token":
        return ProcessReward(place, name=name)
    return ModelReward(place, name=name)
