"""OpenEnv's environments: a server somewhere, and a session of its own for each episode.

    OpenEnvEnvironment("http://localhost:8000", inner, parse="message")   # its observations are the answers
    OpenEnvEnvironment("http://localhost:8000", inner, tools=True)        # its tools are the model's

Either a turn of the model is an action and what the server observes the answer, or the server's MCP tools are
the episode's, each call a step with its reward. A session is reset with the row's columns beside its prompt,
`seed` among them, or else the episode's own; the server takes those that its environment knows.

Needs the extra `openenv`. A server bounds its sessions: let `max_instances` do so, too. Not covered: starting
servers and containers, which OpenEnv's clients do (pass a function that makes one).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from etude.environments.adapters.calls import ForeignCalls
from etude.environments.adapters.instance import (
    PROMPT_COLUMNS,
    Instance,
    InstanceEnvironment,
    extend_prompt,
)
from etude.environments.adapters.stepping import Step, SteppedInstance, StepReward
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, EnvironmentSetupError, ToolError
from etude.rewards.scores import check_weight
from etude.tools.arguments import read_arguments
from etude.tools.contract import to_text
from etude.types import Episode

_ABOUT = ("done", "reward", "metadata")  # what an observation says beside what is observed


class OpenEnvEnvironment(InstanceEnvironment):
    """Plays in sessions of an OpenEnv server.

    Args:
        make: the server's address, or a function that makes a client (an `EnvClient`, not its `sync()`),
            without arguments.
        inner: what plays.
        tools: the server's MCP tools are the model's. Otherwise its turns are actions, and have to end: by an
            end-of-sequence token or one of `stop_strings`.
        parse: a turn's text to an action, a `ValueError` telling the model what was wrong; or the name of the
            action's field that is the text, stripped. By default the text is the action as a JSON object.
        render: an observation, the fields that it has, to text; or the name of the field that is the text. By
            default a single field, or all of them as JSON.
        name: of the steps' reward.
        weight: of the steps' rewards in the episode's.
        invalid_reward: of a turn that is no action.
        timeout, max_instances: see `InstanceEnvironment`.
    """

    def __init__(
        self,
        make: str | Callable[[], Any],
        inner: TextEnvironment,
        *,
        tools: bool = False,
        parse: str | Callable[[str], Any] | None = None,
        render: str | Callable[[Mapping[str, Any]], str] | None = None,
        name: str = "openenv",
        weight: float = 1.0,
        invalid_reward: float = 0.0,
        timeout: float | None = 60.0,
        max_instances: int | None = None,
    ) -> None:
        if tools and (parse is not None or invalid_reward):
            raise ConfigError(
                "with tools the model's turns are no actions; leave parse and invalid_reward out"
            )
        super().__init__(inner, name=name, timeout=timeout, max_instances=max_instances)
        if isinstance(make, str):
            make = functools.partial(_openenv().GenericEnvClient, base_url=make)
        self.make_client = make
        self.tools = tools
        self.parse = functools.partial(_field, parse) if isinstance(parse, str) else parse or _json
        self.render = render
        self.rewards = StepReward(name, check_weight(weight, name), invalid_reward)

    async def make(self, task: Mapping[str, Any], calls: ForeignCalls) -> Instance:
        session = _Session(await calls(self.make_client), self.render, calls)
        return _Toolbox(session, self.rewards) if self.tools else _Talk(session, self)


@dataclass(slots=True)
class _Session:
    """A client and how it is called. It belongs to the event loop, so its calls are coroutines."""

    client: Any
    render: str | Callable[[Mapping[str, Any]], str] | None
    calls: ForeignCalls

    async def reset(self, task: Mapping[str, Any], seed: int) -> str:
        columns = {name: value for name, value in task.items() if name not in PROMPT_COLUMNS}

        async def reset() -> Any:
            return await self.client.reset(**{"seed": seed, **columns})

        return self.text(fields_of((await self.calls(reset)).observation))

    async def step(self, action: Any) -> Any:
        """The result; as text, why the server refuses the action."""

        async def step() -> Any:
            try:
                return await self.client.step(action)
            except RuntimeError as error:
                if "VALIDATION_ERROR" not in str(error):  # the one thing that tells the model's mistake apart
                    raise
                return "That is no action of this environment."

        return await self.calls(step)

    def text(self, fields: Mapping[str, Any]) -> str:
        if callable(self.render):
            return self.render(fields)
        if self.render is not None:
            return to_text(fields.get(self.render))
        seen = {name: value for name, value in fields.items() if name not in _ABOUT}
        return to_text(seen if len(seen) > 1 else next(iter(seen.values()), None))

    async def close(self) -> None:
        async def close() -> None:
            await self.client.close()

        await self.calls.close(close)


class _Talk(SteppedInstance):
    """The model's turns are actions."""

    def __init__(self, session: _Session, environment: OpenEnvEnvironment) -> None:
        super().__init__(environment.inner, environment.rewards)
        self.session = session
        self.parse_action = environment.parse

    async def reset(self, task: Mapping[str, Any], seed: int) -> str:
        return await self.session.reset(task, seed)

    def parse(self, text: str) -> Any:
        return self.parse_action(text)

    async def step(self, action: Any) -> Step:
        result = await self.session.step(action)
        if isinstance(result, str):
            return Step(result, refused=True)
        return Step(self.session.text(fields_of(result.observation)), result.reward, bool(result.done))

    async def close(self) -> None:
        await self.session.close()


class _Toolbox(Instance):
    """The server's tools are the model's."""

    def __init__(self, session: _Session, rewards: StepReward) -> None:
        self.session = session
        self.rewards = rewards
        self.done = False
        self.earned: list[float | None] = []  # in the turn that is being answered

    async def open(self, task: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        said = await self.session.reset(task, seed)
        listed = await self.session.step(_openenv().core.ListToolsAction())
        if isinstance(listed, str) or "tools" not in fields_of(listed.observation):
            raise EnvironmentSetupError(f"{self.rewards.name} has no tools; leave tools= out")
        found = [fields_of(tool) for tool in fields_of(listed.observation)["tools"]]
        self.tools = {tool["name"]: _ServerTool(tool, self) for tool in found}
        return extend_prompt(task, said)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        action = _openenv().core.CallToolAction(tool_name=name, arguments=dict(arguments))
        result = await self.session.step(action)
        if isinstance(result, str):
            raise ToolError(result)
        self.done = bool(result.done)
        self.earned.append(result.reward)
        fields = fields_of(result.observation)
        if fields.get("error"):
            raise ToolError(str(fields_of(fields["error"])["message"]))
        answer = fields.get("result")
        return answer["data"] if isinstance(answer, Mapping) and "data" in answer else answer

    def is_done(self, episode: Episode) -> bool:
        for value in self.earned:
            self.rewards.give(episode, value)
        self.earned.clear()
        return self.done

    async def finish(self, episode: Episode) -> None:
        self.is_done(episode)  # an answer that didn't fit any more was rewarded, too
        self.rewards.none(episode)

    async def close(self) -> None:
        await self.session.close()


class _ServerTool:
    def __init__(self, tool: Mapping[str, Any], toolbox: _Toolbox) -> None:
        self.name: str = tool["name"]
        self.description: str = tool["description"]
        self.schema: Mapping[str, Any] = tool["input_schema"]
        self.toolbox = toolbox

    async def __call__(self, arguments: str | Mapping[str, Any]) -> Any:
        given = read_arguments(arguments, {"properties": {}, **self.schema})
        assert not isinstance(given, str), "the schema has properties"
        return await self.toolbox.call(self.name, given)


def fields_of(model: Any) -> Mapping[str, Any]:
    """What a pydantic object, or what came of one over the wire, says."""
    return model if isinstance(model, Mapping) else model.model_dump(mode="json")


def _field(name: str, text: str) -> dict[str, str]:
    return {name: text.strip()}


def _json(text: str) -> dict[str, Any]:
    """A JSON object, in a fence or not."""
    inside = re.fullmatch(r"```(?:json)?\s*(.*?)```", text.strip(), re.DOTALL)
    try:
        action = json.loads(inside.group(1) if inside else text)
    except (ValueError, RecursionError):
        action = None
    if not isinstance(action, dict):
        raise ValueError(f"{text.strip()[:40]!r} is no action; expected a JSON object")
    return action


def _openenv() -> Any:
    try:
        import openenv
    except ImportError as error:
        raise EnvironmentSetupError("OpenEnv isn't installed; pip install 'etude[openenv]'") from error
    return openenv
