"""The parts of `verifiers` that an episode is made of: tasks, tool servers, traces; and what isn't played."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from etude.errors import EnvironmentSetupError


def import_verifiers() -> Any:
    """The module `verifiers.v1`.

    Raises:
        EnvironmentSetupError: it isn't installed.
    """
    try:
        import verifiers.v1 as vf
    except ImportError as error:
        raise EnvironmentSetupError("verifiers isn't installed; pip install 'etude[verifiers]'") from error
    return vf


def seat_of(environment: Any) -> str:
    """The name of the one agent that an environment has.

    Raises:
        EnvironmentSetupError: it has several.
    """
    from verifiers.v1.configs.agent import agent_config_fields

    names = list(agent_config_fields(environment.config))
    if len(names) != 1:
        raise EnvironmentSetupError(
            f"{type(environment).__name__} has the agents {', '.join(names)}; only one can be played"
        )
    return names[0]


def check_task(vf: Any, task: Any, runtime: Any) -> None:
    """Raise `EnvironmentSetupError` for what would be played otherwise than meant."""
    name = type(task).__name__
    if task.data.image is not None or task.NEEDS_CONTAINER:
        raise EnvironmentSetupError(f"a {name} needs a container for its agent; that isn't covered")
    if hooks := [*task.hooks("stop"), *_decorated(task, "intercept")]:
        raise EnvironmentSetupError(f"{name}.{hooks[0].__name__} stops or changes a run; that isn't covered")
    if runtime is not None:
        return
    scoring = [*task.hooks("metric"), *task.hooks("reward"), *(j.score for j in task.plugged_judges())]
    asking = [fn.__name__ for fn in scoring if _takes_runtime(fn)]
    asking += [
        hook for hook in ("setup", "finalize") if getattr(type(task), hook) is not getattr(vf.Task, hook)
    ]
    if asking:
        raise EnvironmentSetupError(
            f"{name}.{asking[0]} needs a runtime, where the task's own code runs; pass runtime=, for example "
            "SubprocessConfig(), which is this machine"
        )


def _takes_runtime(function: Callable[..., Any]) -> bool:
    parameter = inspect.signature(function).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def check_toolsets(vf: Any, toolsets: Sequence[Any]) -> list[Any]:
    """The tool servers, if they can be played. Raises `EnvironmentSetupError` if not."""
    for toolset in toolsets:
        if getattr(toolset.config, "url", None):
            raise EnvironmentSetupError(f"{type(toolset).__name__} runs elsewhere; that isn't covered")
    stateful = [type(toolset).__name__ for toolset in toolsets if type(toolset.state) is not vf.State]
    if len(stateful) > 1:
        raise EnvironmentSetupError(f"{' and '.join(stateful)} share a state; that isn't covered")
    return list(toolsets)


def tool_methods(toolsets: Sequence[Any]) -> dict[str, Callable[..., Any]]:
    """The tools of servers, by the names that a model knows them by."""
    named: dict[str, Callable[..., Any]] = {}
    for toolset in toolsets:
        prefix = f"{toolset.server_name}_" if toolset.server_name else ""
        for method in _decorated(toolset, "tool"):
            named[prefix + (getattr(method, "tool_name", None) or method.__name__)] = method
    return named


def new_trace(vf: Any, task: Any, toolsets: Sequence[Any], runtime: Any) -> Any:
    """A trace of a task, whose state is that of its tools."""
    from verifiers.v1.state import state_cls

    states = [toolset.state for toolset in toolsets if type(toolset.state) is not vf.State]
    info = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    config = vf.AgentConfig(harness={"id": "null"}, runtime=runtime or vf.SubprocessConfig())
    state = states[0] if states else state_cls(type(task))()
    return vf.Trace(task=info, state=state, agent=vf.AgentInfo(config=config))


def provision(config: Any, name: str, environment: Mapping[str, str]) -> AbstractAsyncContextManager[Any]:
    """Where a task's own code runs."""
    from verifiers.v1.runtimes import provision_runtime

    runtime: AbstractAsyncContextManager[Any] = provision_runtime(config, name, dict(environment))
    return runtime


async def invoke(hook: Callable[..., Any], available: Mapping[str, Any]) -> None:
    """Call a hook with what it asks for by name."""
    parameters = inspect.signature(hook).parameters
    await hook(**{name: value for name, value in available.items() if name in parameters})


def _decorated(obj: Any, mark: str) -> list[Callable[..., Any]]:
    from verifiers.v1.utils.decorators import discover_decorated

    found: list[Callable[..., Any]] = discover_decorated(obj, mark)
    return found
