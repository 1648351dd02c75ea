"""Environments of `verifiers` 0.4 (`verifiers.v1`), with our model in the agent's place.

    environment = VerifiersEnvironment(taskset, ChatEnvironment(model, tokenizer))
    environment.run(environment.rows())

Its data, tool servers, rewards, metrics, judges and the environment's own `run` (a game as the user, say) are
used as they are; what its harness would do, from the chat loop to the tokens, is done here. Tool servers run
in this process, their methods being the episode's tools.

Needs the extra `verifiers`. Refused, because it would be played otherwise than meant: several agents, `@stop`
and `@intercept` hooks, images and containers of tasks, tool servers elsewhere, a state that several of them
share, and code that needs a runtime where none is given. Not covered: harnesses (agents' programs) and
`Env.start`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import islice
from typing import Any

from etude.environments.adapters.calls import ForeignCalls
from etude.environments.adapters.instance import Instance, InstanceEnvironment
from etude.environments.adapters.verifiers_parts import import_verifiers, seat_of
from etude.environments.adapters.verifiers_run import Rollout
from etude.environments.chat_protocol import ChatProtocol
from etude.environments.text import TextEnvironment
from etude.errors import DataError, EnvironmentSetupError

TASK = "task"  # the column that says which task of the taskset a row is


class VerifiersEnvironment(InstanceEnvironment):
    """Plays the tasks of a taskset of `verifiers`.

    Args:
        environment: a `Taskset`, or an `Env` with one agent.
        inner: what plays. A `ChatEnvironment` is given conversations; any other `TextEnvironment` their
            texts, with a blank line between them.
        limit: of the tasks, the first so many; needed where a taskset never ends.
        runtime: the config of where the tasks' own code runs (their `setup`, and rewards that ask for it), in
            the words of `verifiers`. None refuses such tasks: what a model wrote may be run there.
        timeout: seconds for a step of the environment; None for no limit.
        max_instances: see `InstanceEnvironment`.
    """

    def __init__(
        self,
        environment: Any,
        inner: TextEnvironment,
        *,
        limit: int | None = None,
        runtime: Any = None,
        timeout: float | None = 60.0,
        max_instances: int | None = None,
    ) -> None:
        name = type(environment).__name__
        super().__init__(inner, name=name, timeout=timeout, max_instances=max_instances)
        self.vf = import_verifiers()
        if not isinstance(environment, self.vf.Env | self.vf.Taskset):
            raise EnvironmentSetupError(f"environment is a {name}; expected a Taskset or an Env of verifiers")
        self.environment = environment if isinstance(environment, self.vf.Env) else None
        if self.environment is not None:
            seat_of(self.environment)
        self.taskset = environment if self.environment is None else environment.taskset
        if limit is None and not self.taskset.bounded:
            raise EnvironmentSetupError(f"{type(self.taskset).__name__} never ends; pass limit=")
        self.limit = limit
        self.runtime = runtime

    @cached_property
    def tasks(self) -> list[Any]:
        """The taskset's tasks."""
        return list(islice(self.taskset, self.limit))

    def rows(self) -> list[dict[str, Any]]:
        """The tasks as rows to play: their number, and their prompts as text, to look at."""
        return [{TASK: number, "prompt": task.data.prompt_text} for number, task in enumerate(self.tasks)]

    async def make(self, task: Mapping[str, Any], calls: ForeignCalls) -> Instance:
        number = task.get(TASK)
        if not isinstance(number, int) or not 0 <= number < len(self.tasks):
            raise DataError(
                f"a row's {TASK!r} is {number!r}; expected the number of one of the {len(self.tasks)} tasks: "
                "play rows()"
            )
        return Rollout(
            self.vf,
            self.environment,
            self.tasks[number],
            as_chat=isinstance(self.inner.protocol, ChatProtocol),
            shared_toolsets=lambda: self.taskset.toolsets(self.taskset.config),
            runtime=self.runtime,
            calls=calls,
        )
