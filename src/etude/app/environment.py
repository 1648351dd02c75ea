"""A model in its environment, as the command line describes them: where every command that plays starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from etude.app.arguments import EnvironmentArguments, FixedModelArguments
from etude.app.references import load_object
from etude.environments.text import TextEnvironment
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
        tools, rewards, reward_fn: as `TextEnvironment` takes them.
    """

    settings: EnvironmentArguments
    tools: list[Any]
    rewards: list[Any]
    reward_fn: Any

    @classmethod
    def load(cls, settings: EnvironmentArguments) -> EnvironmentCode:
        """Raises `ConfigError` where a reference leads nowhere."""
        return cls(
            settings,
            tools=[load_object(reference, "etude.tools") for reference in settings.tools],
            rewards=[load_object(reference, "etude.rewards") for reference in settings.rewards],
            reward_fn=load_object(settings.reward_fn, "etude.rewards") if settings.reward_fn else None,
        )

    def environment(self, model: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> TextEnvironment:
        """The environment around a model.

        Args:
            options: of `TextEnvironment`, besides what the settings say.
        """
        settings, rewards = self.settings, list(self.rewards)
        if settings.reward_adapter is not None:
            rewards.append(AdapterReward(RewardAdapter.load(model, settings.reward_adapter)))
        rewards += [_reward_of(place) for place in settings.reward_models]
        return TextEnvironment(
            model,
            tokenizer,
            tools=self.tools,
            rewards=rewards,
            reward_fn=self.reward_fn,
            prompt=settings.prompt_text(),
            max_turns=settings.max_turns,
            max_tool_reponse=settings.max_tool_response,
            max_tool_response_tokens=settings.max_tool_response_tokens,
            max_tool_calls=settings.max_tool_calls,
            max_length=settings.max_length,
            tool_timeout=settings.tool_timeout,
            generation_kwargs=settings.generation,
            **options,
        )


def build_environment(
    load_model: Callable[..., Any],
    model_arguments: FixedModelArguments,
    episodes: EnvironmentArguments,
    seed: int,
) -> TextEnvironment:
    """The environment, around the model (its `model`) that it has loaded, and the `tokenizer`.

    Call it after the data are read: mistakes in them, and in the code that `episodes` names, show before a
    model is loaded.

    Args:
        load_model: from a name and what the arguments say, such as `load_causal_lm`.
        seed: of what starts at random in the model (a value head, an adapter), and of the episodes.
    """
    code = EnvironmentCode.load(episodes)
    set_seed(seed)
    tokenizer = load_tokenizer(**model_arguments.tokenizer_place)
    model = load_model(
        model_arguments.model_name_or_path,
        peft_config=model_arguments.peft_config(),
        **model_arguments.loading,
    )
    return code.environment(model, tokenizer)


def _reward_of(place: str) -> ModelReward | ProcessReward:
    name = Path(place).name
    if kind_in(place) == "token":
        return ProcessReward(place, name=name)
    return ModelReward(place, name=name)
