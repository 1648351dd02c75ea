"""Other people's environments, one object per episode, around a `TextEnvironment` that plays.

    made ─► opened, what it says joins the prompt ─► the inner environment plays with its tools, or with it as
    the user ─► its rewards ─► closed

Model, prompt, limits, protocol and rewards are those of the inner environment. What the foreign object breaks
is data: the episode ends for `StopReason.INFRASTRUCTURE`, with the reason in its `error`.

Not covered: keeping objects for later episodes; noise in their tools' replies (`evaluation`).
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from etude.environments.adapters.binding import Binder
from etude.environments.adapters.calls import ForeignCalls
from etude.environments.running import Runs
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, DataError, EnvironmentSetupError, InstanceError, SamplerError
from etude.protocols import Sampler, Session, Tool
from etude.types import Episode, Sampled, SamplingParams, StopReason

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("messages", "prompt", "query")


class Instance(ABC):
    """Somebody else's environment, for one episode.

    Attributes:
        tools: by name, beside those of the inner environment; known once it is open.
    """

    tools: Mapping[str, Tool] = {}

    @abstractmethod
    async def open(self, task: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        """Begin the episode; the task as it is to be played, see `extend_prompt`."""

    async def reply(self, episode: Episode) -> str | None:
        """The answer to a turn that called no tool; None ends the episode. By default such a turn does."""
        return None

    def is_done(self, episode: Episode) -> bool:
        """Asked after each turn and each tool's answer, and may write down what came of it."""
        return False

    @abstractmethod
    async def finish(self, episode: Episode) -> None:
        """Append its rewards to an episode that was played to its end."""

    @abstractmethod
    async def close(self) -> None:
        """Give up what it holds; also where it couldn't be opened."""


class InstanceEnvironment(Runs):
    """Plays each episode in an object of its own.

    Args:
        inner: what plays. Its rewards are given beside the object's own.
        name: of what plays, in messages.
        timeout: seconds for one call of the object, its tools apart (they have the inner environment's
            `tool_timeout`); None for no limit.
        max_instances: how many objects there are at once, at most; by default twice as many as the inner
            environment's sampler has slots, so that none of them idles.

    Attributes:
        tokenizer, params, max_length, slots, next_seed: of the inner environment, see `traits`.
    """

    def __init__(
        self,
        inner: TextEnvironment,
        *,
        name: str,
        timeout: float | None = 60.0,
        max_instances: int | None = None,
    ) -> None:
        if not isinstance(inner, TextEnvironment):
            raise EnvironmentSetupError(
                f"inner is a {type(inner).__name__}; expected the TextEnvironment that plays"
            )
        if max_instances is not None and max_instances < 1:
            raise ConfigError(f"max_instances is {max_instances}; expected at least 1")
        if timeout is not None and timeout <= 0:
            raise ConfigError(f"timeout is {timeout}; expected seconds > 0, or None for no limit")
        self.inner = inner
        self.name = name
        self.timeout = timeout
        self.max_instances = max_instances
        self.tokenizer, self.params, self.max_length = inner.tokenizer, inner.params, inner.max_length
        self.slots, self.next_seed = inner.slots, inner.next_seed
        self._binder = Binder(inner, name)
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    @property
    def model(self) -> nn.Module | None:
        return self.inner.model

    @property
    def sampler(self) -> Sampler:
        """The inner environment's."""
        return self.inner.sampler

    @abstractmethod
    async def make(self, task: Mapping[str, Any], calls: ForeignCalls) -> Instance:
        """Make the object of an episode, by way of `calls`."""

    async def play(self, task: Mapping[str, Any], sampler: Sampler, *, seed: int) -> Episode:
        """Play one episode in an object of its own."""
        async with self._gate():
            calls = ForeignCalls(self.name, self.timeout)
            instance: Instance | None = None
            episode: Episode | None = None
            try:
                instance = await self.make(task, calls)
                opened = await instance.open(task, seed)
                episode = await self._bound(instance, calls).play(opened, sampler, seed=seed)
                if episode.stop is not StopReason.INFRASTRUCTURE and calls.failure is None:
                    await instance.finish(episode)
            except InstanceError as failure:  # the boundary: what somebody else's code breaks is data
                calls.failure = calls.failure or failure
            finally:
                await _close(instance, calls)
        if episode is None:  # not even begun: its prompt, and no turn
            unplayed = _NoSampler(sampler)
            episode = await self.inner.play(extend_prompt(task, None), unplayed, seed=seed)
        if calls.failure is not None:
            episode.stop, episode.error = StopReason.INFRASTRUCTURE, str(calls.failure)
        episode.task = task
        return episode

    async def score(self, episodes: Sequence[Episode]) -> None:
        """Append the inner environment's rewards to each episode."""
        await self.inner.score(episodes)

    def _bound(self, instance: Instance, calls: ForeignCalls) -> TextEnvironment:
        async def user(episode: Episode) -> str | None:
            try:
                return await instance.reply(episode)
            except InstanceError as failure:
                calls.failure = calls.failure or failure
                return None

        def is_done(episode: Episode) -> bool:
            return calls.failure is not None or instance.is_done(episode)

        speaks = type(instance).reply is not Instance.reply
        return self._binder.bind(instance.tools, user if speaks else None, is_done)

    def _gate(self) -> asyncio.Semaphore:
        """Of the running loop: each plain call may have its own."""
        loop = asyncio.get_running_loop()
        if loop not in self._gates:
            self._gates[loop] = asyncio.Semaphore(self.max_instances or 2 * self.inner.slots)
        return self._gates[loop]


async def _close(instance: Instance | None, calls: ForeignCalls) -> None:
    try:
        if instance is not None:
            await instance.close()
    except InstanceError as failure:  # the episode is over and keeps what it came to
        logger.warning("%s", failure)
    finally:
        calls.release()


def extend_prompt(task: Mapping[str, Any], said: str | None) -> dict[str, Any]:
    """The task with text added to its prompt, at the end of the last message where it is made of messages.

    Raises:
        DataError: the prompt is neither text nor messages.
    """
    column = next((name for name in PROMPT_COLUMNS if name in task), "prompt")
    prompt = task.get(column, "")
    if said is None and column in task:
        return dict(task)
    if isinstance(prompt, str):
        return {**task, column: prompt + (said or "")}
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[-1].get("content"), str):
        raise DataError(f"a task's {column!r} is {prompt!r}; expected text, or messages that end in a text")
    last = {**prompt[-1], "content": prompt[-1]["content"] + (said or "")}
    return {**task, column: [*prompt[:-1], last]}


class _NoSampler:
    """Stands for a sampler in an episode that can't begin: its prompt is written down, nothing is sampled."""

    def __init__(self, sampler: Sampler) -> None:
        self.policy_version = sampler.policy_version
        self.max_length = sampler.max_length
        self.max_source_length = sampler.max_source_length
        self.decoder_start = sampler.decoder_start

    def session(self, *, seed: int, source_ids: Sequence[int] = ()) -> Session:
        return self

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Sampled:
        raise SamplerError("the episode could not begin")

    def close(self) -> None:
        """Nothing is held."""
