"""Environments that are stepped: what one says is the model's turn's answer, what the model says an action.

    reset ─► observation, at the end of the prompt ─► model turn ─► parsed as an action ─► step ─► reward, and
    the next observation ─► … ─► terminated or truncated

A step's reward sits on the last token that the model sampled for it. A turn that is no action is answered
with what was wrong, and the environment isn't stepped. What has terminated ends for `StopReason.DONE`; what
was truncated for `MAX_TURNS`: a limit on steps is one on turns, it holds at evaluation as well, and so it is
part of the task, and its value doesn't bootstrap. A run that sees it otherwise says so in `stop_policies`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etude.environments.adapters.instance import Instance, extend_prompt
from etude.environments.text import TextEnvironment
from etude.rewards.levels import positions
from etude.rewards.scores import check_scores
from etude.types import Episode, NamedReward, StopReason

INVALID = "invalid_actions"  # how many turns were no action: a number to look at, of weight 0


@dataclass(frozen=True, slots=True)
class Step:
    """What came of an action.

    Attributes:
        text: what the model reads next.
        reward: None where there is none.
        terminated: the task has come to its end.
        truncated: the environment's own limit has cut it off.
        refused: it was no action after all; the text says why.
    """

    text: str
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False
    refused: bool = False


@dataclass(frozen=True, slots=True)
class StepReward:
    """How steps are rewarded.

    Attributes:
        name: of the steps' rewards.
        weight: of them in the episode's reward.
        invalid: the reward of a turn that is no action.
    """

    name: str
    weight: float = 1.0
    invalid: float = 0.0

    def give(self, episode: Episode, value: float | None) -> None:
        """Append the reward of the episode's last turn.

        Raises:
            RewardError: it is no finite number.
        """
        [value] = check_scores([value], self.name, [episode])
        episode.rewards.append(NamedReward(self.name, value, self.weight, positions(episode, "turn")[-1]))

    def none(self, episode: Episode) -> None:
        """Leave the name where no step was rewarded, so that every episode has it."""
        if all(reward.name != self.name for reward in episode.rewards):
            episode.rewards.append(NamedReward(self.name, None, self.weight))


class SteppedInstance(Instance):
    """An environment that is stepped, for one episode."""

    def __init__(self, inner: TextEnvironment, rewards: StepReward) -> None:
        self.inner = inner
        self.rewards = rewards
        self.ended: StopReason | None = None
        self.answered = 0  # turns, as far as this instance has seen them
        self.invalid = 0

    @abstractmethod
    async def reset(self, task: Mapping[str, Any], seed: int) -> str:
        """Begin; the first observation as text."""

    @abstractmethod
    def parse(self, text: str) -> Any:
        """A turn's text as an action.

        Raises:
            ValueError, LookupError: it is none; the message is for the model to read.
        """

    @abstractmethod
    async def step(self, action: Any) -> Step:
        """Act."""

    async def open(self, task: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        return extend_prompt(task, await self.reset(task, seed))

    async def reply(self, episode: Episode) -> str | None:
        self.answered = episode.turns
        try:
            action = self.parse(episode.last_model_text)
        except (ValueError, LookupError) as error:  # the model's mistake
            step = Step(str(error.args[0]) if error.args else type(error).__name__, refused=True)
        else:
            step = await self.step(action)
        self.invalid += step.refused
        self.rewards.give(episode, self.rewards.invalid if step.refused else step.reward)
        if step.terminated or step.truncated:
            self.ended = StopReason.DONE if step.terminated else StopReason.MAX_TURNS
            return None
        return step.text

    async def finish(self, episode: Episode) -> None:
        # The last turn that the limit allows is an action, too; nobody was asked for an answer to it.
        unanswered = episode.stop is StopReason.MAX_TURNS and self.answered < episode.turns
        if unanswered and not self.inner.protocol.parse(episode.last_model_text).calls:
            await self.reply(episode)
        if self.ended is not None:
            episode.stop = self.ended
        self.rewards.none(episode)
        episode.rewards.append(NamedReward(INVALID, float(self.invalid), weight=0.0))
