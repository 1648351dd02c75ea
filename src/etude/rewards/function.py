"""Plain functions as rewards, sync or async.

A function sees what the model wrote and nothing else of the completion, so that a tool's text can't
forge an answer. Sync functions run in a thread: sampling goes on while they score.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter
from typing import Any

from etude.errors import RewardError
from etude.protocols import Reward
from etude.rewards.levels import Level, Score, check_level
from etude.rewards.scores import check_scores, check_weight
from etude.types import Episode


class FunctionReward:
    """A function `f(prompts, completions, **columns) -> list of scores` as a `Reward`.

    Arguments are passed by name, and only those that the function declares, unless it takes `**kwargs`:
    `prompts` and `completions` (lists of str, one per episode; completions are the model's own text; where an
    episode's prompt is messages, both are lists of messages, the completion's one per turn of the model), the
    columns of the episodes' tasks (lists, None where a task lacks the column), and `episodes`, the
    `Episode` objects, where it is declared. At the level "turn" also `turns`, for each episode the texts of
    the model's turns; at "token" `token_ids`, for each the tokens that were sampled. These names hide columns
    of the same name.

    Args:
        function: sync or async. Returns one score per episode: a number, a numpy or torch scalar or
            None where it doesn't apply; or a 1-D array or tensor. At the levels "turn" and "token" a score
            is a list of these, one per turn of the model or per sampled token; `levels.positions` says where
            each of them sits.
        name: in metrics; by default the function's `__name__` or the object's class name.
        weight: of its score in the episode's reward.
        level: what it scores: the "episode" as a whole, each "turn" of it, or each "token".
        columns: where a parameter's values are, if not in the column of its name: another column's name, or a
            function of a task.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        weight: float = 1.0,
        level: Level = "episode",
        columns: Mapping[str, str | Callable[[Mapping[str, Any]], Any]] | None = None,
    ) -> None:
        self.function = function
        self.name = name_of(function) if name is None else name
        self.weight = check_weight(weight, self.name)
        self.level = check_level(level, self.name)
        self.columns = dict(columns or {})
        self._parameters = _parameters(function, self.name)

    async def __call__(self, episodes: Sequence[Episode]) -> list[Score]:
        """Score episodes.

        Raises:
            RewardError: a parameter that nothing can fill, or scores that `check_scores` refuses.
        """
        if not episodes:
            return []
        found = task_columns(episodes)
        available: dict[str, Any] = {
            **found,
            **_elsewhere(self.columns, found, episodes),
            "prompts": [prompt_of(episode) for episode in episodes],
            "completions": [completion_of(episode) for episode in episodes],
        }
        if self.level == "turn":
            available["turns"] = [["".join(s.text for s in turn) for turn in e.model_turns] for e in episodes]
        elif self.level == "token":
            available["token_ids"] = [
                [t for s in e.segments if s.sampled for t in s.token_ids] for e in episodes
            ]
        if "episodes" in self._parameters:
            available["episodes"] = list(episodes)
        arguments = select_arguments(self._parameters, available, self.name)
        scores = await _call(self.function, arguments, self.name)
        return check_scores(scores, self.name, episodes, self.level)

    def check_columns(self, columns: Collection[str]) -> None:
        """Say before anything is played what no task will provide.

        Raises:
            RewardError: a parameter that tasks of these columns can't fill.
        """
        own = {name for name in columns if name != "prompt"} | {"prompts", "completions", "episodes"}
        own |= {name for name, place in self.columns.items() if callable(place) or place in columns}
        own |= {"turns"} if self.level == "turn" else {"token_ids"} if self.level == "token" else set()
        select_arguments(self._parameters, dict.fromkeys(sorted(own)), self.name)


def reward(
    *, name: str | None = None, weight: float = 1.0, level: Level = "episode"
) -> Callable[[Callable[..., Any]], FunctionReward]:
    """`FunctionReward` as a decorator: `@reward(level="turn", weight=0.1)`.

    The function itself stays within reach, as `function`.
    """
    return functools.partial(FunctionReward, name=name, weight=weight, level=level)


class SegmentReward:
    """The reward of TRL 0.7.4's text environment, `reward_fn(last_segments, **columns) -> scores`.

    The last segment is the last text that the model wrote, also where an episode ended on a tool's text.

    Args:
        reward_fn: its first parameter takes the segments (list of str), the others columns by name.
        weight: of its score in the episode's reward.
        columns: passed by name as they are, for example `answers=[…]`, in the episodes' order. Columns of
            the episodes' tasks are passed too, those that the function names, or all if it takes
            `**kwargs`; one given here hides a task's column of the same name.

    Raises:
        RewardError: `reward_fn` is a `Reward` already, or doesn't take one of the columns.
    """

    def __init__(self, reward_fn: Callable[..., Any], weight: float = 1.0, **columns: Any) -> None:
        if isinstance(reward_fn, Reward):
            raise RewardError(
                f"reward_fn is the reward {reward_fn.name!r}; pass it among rewards=[...] instead"
            )
        self.function = reward_fn
        self.name = name_of(reward_fn)
        self.weight = check_weight(weight, self.name)
        self.columns = columns
        parameters = _parameters(reward_fn, self.name, by_position=1)
        self._parameters = dict(list(parameters.items())[1:])
        self._takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
        if not self._takes_any and (unknown := [c for c in columns if c not in self._parameters]):
            raise RewardError(
                f"reward function {self.name!r} has no parameter for {_listed(unknown)}; "
                f"it takes {_listed(self._parameters)}: pass only those, or declare **kwargs"
            )

    async def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        """Score episodes; raises `RewardError` as `FunctionReward` does."""
        if not episodes:
            return []
        columns = task_columns(episodes)
        declared = {k: v for k, v in columns.items() if self._takes_any or k in self._parameters}
        arguments = select_arguments(self._parameters, {**declared, **self.columns}, self.name)
        function = functools.partial(self.function, [episode.last_model_text for episode in episodes])
        return check_scores(await _call(function, arguments, self.name), self.name, episodes)

    def check_columns(self, columns: Collection[str]) -> None:
        """As `FunctionReward.check_columns`."""
        own = {name for name in columns if name != "prompt"} | self.columns.keys()
        select_arguments(self._parameters, dict.fromkeys(sorted(own)), self.name)


def as_reward(obj: Any) -> Reward:
    """A `Reward` as it is; a function or callable object as a `FunctionReward`.

    Raises:
        RewardError: it is neither.
    """
    if inspect.isclass(obj):
        raise RewardError(f"reward {obj.__name__} is a class; expected an object of it, {obj.__name__}(...)")
    if isinstance(obj, Reward):
        return obj
    if hasattr(obj, "forward"):
        raise RewardError(
            f"reward is a model, {type(obj).__name__}; expected a function of texts: "
            f"wrap it in ClassifierReward(model, tokenizer)"
        )
    if not callable(obj):
        raise RewardError(f"reward is {obj!r}; expected a function f(prompts, completions, **columns)")
    return FunctionReward(obj)


def name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def conversation_of(episode: Episode) -> list[dict[str, Any]] | None:
    """The messages that a task is; None where it is a text."""
    given = episode.task.get("messages", episode.task.get("prompt"))
    return list(given) if isinstance(given, list | tuple) else None


def prompt_of(episode: Episode) -> str | list[dict[str, Any]]:
    conversation = conversation_of(episode)
    return episode.prompt if conversation is None else conversation


def completion_of(episode: Episode) -> str | list[dict[str, Any]]:
    """What the model wrote, and nothing else: as text or, after messages, as one message per turn."""
    if conversation_of(episode) is None:
        return episode.completion
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(episode.model_turns):
        messages.append({"role": "assistant", "content": "".join(segment.text for segment in turn)})
        functions = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in episode.tool_calls
            if call.turn == index and call.name is not None
        ]
        if functions:
            messages[-1]["tool_calls"] = functions
    return messages


def answer_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """A completion, or the last message of one."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"]) if completion else ""


def task_columns(episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    """All columns of the episodes' tasks but the prompt, as lists; None where a task lacks one."""
    names = dict.fromkeys(name for episode in episodes for name in episode.task if name != "prompt")
    return {name: [episode.task.get(name) for episode in episodes] for name in names}


def _elsewhere(
    columns: Mapping[str, str | Callable[[Mapping[str, Any]], Any]],
    found: Mapping[str, list[Any]],
    episodes: Sequence[Episode],
) -> dict[str, list[Any]]:
    """Values of parameters that aren't in the column of their name; a column that no task has is left out."""
    values = {}
    for parameter, place in columns.items():
        if callable(place):
            values[parameter] = [place(episode.task) for episode in episodes]
        elif place in found:
            values[parameter] = found[place]
    return values


def select_arguments(
    parameters: dict[str, Parameter], available: dict[str, Any], name: str
) -> dict[str, Any]:
    """What the function declares, or everything if it takes `**kwargs`.

    Raises:
        RewardError: a required parameter is not available.
    """
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    named = {k: p for k, p in parameters.items() if p.kind not in variadic}
    missing = [k for k, p in named.items() if p.default is Parameter.empty and k not in available]
    if missing:
        raise RewardError(
            f"reward function {name!r} needs {_listed(missing)}, which no column provides; "
            f"found {_listed(available)}: rename the parameter, add the column, or give it a default"
        )
    open_ended = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    return {k: v for k, v in available.items() if open_ended or k in named}


def _parameters(function: Callable[..., Any], name: str, by_position: int = 0) -> dict[str, Parameter]:
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"the parameters of reward {name!r} can't be read from {function!r}; expected a function with "
            f"named parameters: wrap it in one"
        ) from error
    for parameter in list(parameters.values())[by_position:]:
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            raise RewardError(
                f"reward function {name!r} takes {parameter.name!r} by position only; expected parameters "
                f"that can be passed by name: remove the '/'"
            )
    return parameters


async def _call(function: Callable[..., Any], arguments: dict[str, Any], name: str) -> Any:
    call = functools.partial(function, **arguments)
    try:
        result = call() if inspect.iscoroutinefunction(call) else await asyncio.to_thread(_returned, call)
        return await result if inspect.isawaitable(result) else result
    except Exception as error:  # the user's own error goes on as it is, with its origin
        error.add_note(f"raised by reward function {name!r}")
        raise


def _returned(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except StopIteration as error:  # no future can carry it: awaiting the thread would never end
        raise RuntimeError("raised StopIteration: a call of next() found nothing") from error


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"
