"""One episode of a `verifiers` environment: its `run(task, agents)` on one side, our playing on the other.

    Env.run ─► agent.run(task), or agent.interaction(task) and its turn(message) … ─► trace, scored
                     │ ▲                                  │ ▲
                     ▼ │                                  ▼ │
              the prompt of our episode              a user's reply

The agent that `Env.run` is given is a stand-in: what it is asked becomes our episode's prompt and the user's
replies, what our model says is what it answers. So tools, tokens and limits are those of our environment.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from etude.environments.adapters.calls import ForeignCalls
from etude.environments.adapters.instance import PROMPT_COLUMNS, Instance
from etude.environments.adapters.verifiers_parts import (
    check_task,
    check_toolsets,
    invoke,
    new_trace,
    provision,
    seat_of,
    tool_methods,
)
from etude.environments.adapters.verifiers_trace import (
    as_dicts,
    as_messages,
    fill,
    stop_condition,
    turn_messages,
)
from etude.errors import EnvironmentSetupError, InstanceError
from etude.rewards.scores import check_scores
from etude.types import Episode, NamedReward


class Rollout(Instance):
    """A task as an environment of `verifiers` plays it.

    Args:
        vf: the module `verifiers.v1`.
        environment: its `Env`; None for a task alone.
        task: its `Task`.
        as_chat: prompts are messages, else text.
        shared_toolsets: makes the tool servers that all tasks share.
        runtime: the config of where the task's own code runs; None: nowhere.
        calls: the way to its code.
    """

    def __init__(
        self,
        vf: Any,
        environment: Any,
        task: Any,
        *,
        as_chat: bool,
        shared_toolsets: Callable[[], list[Any]],
        runtime: Any,
        calls: ForeignCalls,
    ) -> None:
        self.vf = vf
        self.environment = environment
        self.task = task
        self.as_chat = as_chat
        self.shared_toolsets = shared_toolsets
        self.runtime_config = runtime
        self.calls = calls
        self.trace: Any = None
        self.prompt: list[Any] = []
        self.episode: Episode | None = None
        self._asked: asyncio.Queue[list[Any]] = asyncio.Queue()  # what a turn is to answer
        self._said: asyncio.Queue[Any] = asyncio.Queue()  # what it answered
        self._heard = 0  # turns of the model that were handed over
        self._owed = False  # a turn was asked for and not answered yet
        self._over = False
        self._driver: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()

    # What our side asks.

    async def open(self, task: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        self._driver = asyncio.ensure_future(self._drive())
        said = await self._next()
        if said is None:
            raise InstanceError(f"{self.calls.name}: no turn of the model was asked for")
        self.prompt = said
        row = {name: value for name, value in task.items() if name not in PROMPT_COLUMNS}
        messages = as_dicts(said)
        if self.as_chat:
            return {**row, "prompt": messages}
        if others := {m["role"] for m in messages} - {"system", "user"}:
            raise EnvironmentSetupError(
                f"{self.calls.name}: the prompt has messages of the role {min(others)!r}, which have no "
                "place in a text; play it in a ChatEnvironment"
            )
        return {**row, "prompt": "\n\n".join(message["content"] for message in messages)}

    async def reply(self, episode: Episode) -> str | None:
        self._hand_over(episode)
        said = await self._next()
        return None if said is None else "\n\n".join(message["content"] for message in as_dicts(said))

    async def finish(self, episode: Episode) -> None:
        assert self._driver is not None, "it was opened"
        self._over = True
        if self._heard < episode.turns:  # the last turn that a limit allows was answered by nobody
            self._hand_over(episode)
        elif self._owed:  # what was asked didn't fit any more
            self._write(episode)
            self._said.put_nowait(self.vf.Segment(messages=[], terminated=True))
        if await self._next() is not None:
            raise InstanceError(f"{self.calls.name} asks for a turn of an episode that is over")
        for name, reward in self.trace.rewards.items():
            score, weight = (None, 1.0) if reward is None else (reward.score, reward.weight)
            self._give(episode, name, score, weight)
        for name, value in self.trace.metrics.items():
            self._give(episode, name, value, 0.0)

    def _give(self, episode: Episode, name: str, score: float | None, weight: float) -> None:
        [score] = check_scores([score], name, [episode])
        episode.rewards.append(NamedReward(name, score, weight))

    def _hand_over(self, episode: Episode) -> None:
        """The turns since the user last spoke, as what the stand-in's turn came to."""
        turns = range(self._heard, episode.turns)
        messages = [message for turn in turns for message in turn_messages(self.vf, episode, turn)]
        self._heard, self._owed = episode.turns, False
        self._write(episode)
        self._said.put_nowait(self.vf.Segment(messages=messages))

    def _write(self, episode: Episode) -> None:
        self.episode = episode
        fill(self.vf, self.trace, self.prompt, episode)

    async def _next(self) -> list[Any] | None:
        """What the next turn of the model is to answer; None where the environment's run has ended."""
        assert self._driver is not None, "it was opened"
        asked = asyncio.ensure_future(self._asked.get())
        try:
            await asyncio.wait(
                {asked, self._driver}, timeout=self.calls.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if asked.done():
                return asked.result()
        finally:
            asked.cancel()
        if not self._driver.done():
            raise InstanceError(f"{self.calls.name} did not go on within {self.calls.timeout} seconds")
        failure = None if self._driver.cancelled() else self._driver.exception()
        if isinstance(failure, EnvironmentSetupError | InstanceError):
            raise failure
        if failure is not None:
            raise InstanceError(f"{self.calls.name} raised {type(failure).__name__}: {failure}") from failure
        return None

    async def close(self) -> None:
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.wait({self._driver}, timeout=self.calls.timeout)
            if self._driver.done() and not self._driver.cancelled():
                self._driver.exception()  # it has been said, or the episode is over: asyncio needn't log it
        await self._stack.aclose()

    # What the environment's side asks.

    async def _drive(self) -> None:
        if self.environment is None:
            await _Seat(self).run(self.task)
            return
        seats = _Seats(self.environment, _Seat(self))
        await self.environment.setup(seats)
        await self.environment.run(self.task, seats)
        if self.trace is not None:
            vf, task = self.vf, self.trace.task
            episode = vf.Episode(env=vf.EnvInfo(id=self.environment.config.env_id), task=task)
            episode.traces.append(self.trace)
            await self.environment.finalize(self.task, episode)

    @asynccontextmanager
    async def begun(self, task: Any) -> AsyncIterator[Any]:
        """From a task to its trace, with what it needs around; at the end it is scored."""
        vf = self.vf
        if self.trace is not None:
            raise EnvironmentSetupError(
                f"{self.calls.name} runs its agent more than once; that isn't covered"
            )
        check_task(vf, task, self.runtime_config)
        own, shared = task.toolsets(task.config), self.shared_toolsets()
        sets = check_toolsets(vf, [*own, *shared])
        self.trace = new_trace(vf, task, sets, self.runtime_config)
        available = {"trace": self.trace}
        if self.runtime_config is not None:
            environment = task.runtime_env()
            provisioned = provision(self.runtime_config, self.trace.id, environment)
            available["runtime"] = await self._stack.enter_async_context(provisioned)
            await invoke(task.setup, available)
        for each in sets:
            await each.setup()
        for each in own:
            await each.setup_task(task.data)
        self.tools = {name: self.calls.tool(method, name) for name, method in tool_methods(sets).items()}
        yield self.trace
        if self.episode is None:
            raise InstanceError(f"{self.calls.name}: no turn of the model was asked for")
        self.trace.stop(stop_condition(self.episode))
        if self.runtime_config is not None:
            await invoke(task.finalize, available)
        await task.score(self.trace, available.get("runtime"))
        self.trace.is_completed = self.trace.ok = True

    async def turn(self, messages: list[Any]) -> Any:
        if self._over:
            return self.vf.Segment(messages=[], terminated=True)
        self._owed = True
        self._asked.put_nowait(messages)
        return await self._said.get()


class _Seat:
    """Stands for the agent that plays."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.trainable = True

    async def run(self, task: Any, **options: Any) -> Any:
        async with self.interaction(task, **options) as interaction:
            await interaction.turn()
        return interaction.trace

    @asynccontextmanager
    async def interaction(self, task: Any, **options: Any) -> AsyncIterator[_Interaction]:
        if given := [name for name, value in options.items() if value]:
            raise EnvironmentSetupError(f"an agent is run with {given[0]}=; that isn't covered")
        async with self.rollout.begun(task) as trace:
            yield _Interaction(self.rollout, task, trace)


class _Interaction:
    """Stands for an agent's run, held open turn by turn: the caller is the user."""

    def __init__(self, rollout: Rollout, task: Any, trace: Any) -> None:
        self.rollout = rollout
        self.task = task
        self.trace = trace
        self.started = False

    async def turn(self, message: Any = None) -> Any:
        vf, data = self.rollout.vf, self.task.data
        prompted = not self.started and data.prompt is not None
        if prompted == (message is not None):
            raise ValueError(
                "a task with a prompt speaks first, so its first turn takes no message; every other takes one"
            )
        opening = []
        if not self.started:
            opening = [vf.SystemMessage(content=data.system_prompt)] if data.system_prompt else []
            opening += as_messages(vf, data.prompt)
        self.started = True
        return await self.rollout.turn([*opening, *as_messages(vf, message)])


class _Seats:
    """Stands for an environment's agents, of which there is one."""

    def __init__(self, environment: Any, seat: _Seat) -> None:
        self._name = seat_of(environment)
        self._seat = seat

    def __getattr__(self, name: str) -> _Seat:
        if name != self._name:
            raise AttributeError(f"the environment has one agent, {self._name!r}, and no {name!r}")
        return self._seat
