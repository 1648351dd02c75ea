"""The environment that a command's options describe: their code first, then the model's world around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from etude.app.arguments import EnvironmentArguments
from etude.app.references import load_object
from etude.environments.text import TextEnvironment
from etude.models.reward_adapter import RewardAdapter
from etude.rewards.adapter import AdapterReward


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
