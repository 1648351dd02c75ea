"""Metrics of texts as rewards: `metric_reward("chrf", weight=0.5)`, and what their modules share.

Each metric is a function `f(completions, <reference>, **settings)` like any other reward. Not covered: what
they compute (`translation`, `summary`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar, cast

from etude.errors import ConfigError, RewardError
from etude.rewards import METRICS
from etude.rewards.function import FunctionReward, answer_text

_Function = TypeVar("_Function", bound=Callable[..., Any])


def metric_reward(
    kind: str,
    weight: float = 1.0,
    name: str | None = None,
    columns: Mapping[str, str | Callable[[Mapping[str, Any]], Any]] | None = None,
    **settings: Any,
) -> FunctionReward:
    """A metric as a reward.

    Args:
        kind: one of `etude.rewards.METRICS`.
        weight: of its score in the episode's reward.
        name: in metrics of the run; the metric's by default.
        columns: where its references are, such as `{"target": "de"}`, see `FunctionReward`.
        settings: of the metric, such as `words=30` for `length_penalty`.

    Raises:
        ConfigError: there is no such metric or setting, or the library that it needs isn't installed.
    """
    if kind not in METRICS:
        near = difflib.get_close_matches(kind, METRICS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(METRICS)}"
        raise ConfigError(f"there is no metric {kind!r}; {hint}")
    function = getattr(import_module(METRICS[kind]), kind)
    reads = list(inspect.signature(function).parameters)
    known = function.__kwdefaults__ or {}
    if unknown := [setting for setting in settings if setting not in known]:
        takes = ", ".join(known) or "none"
        raise ConfigError(f"the metric {kind!r} has no setting {unknown[0]!r}; its settings are: {takes}")
    if unknown := [parameter for parameter in columns or {} if parameter not in reads]:
        takes = ", ".join(parameter for parameter in reads if parameter not in ("completions", "episodes"))
        raise ConfigError(f"the metric {kind!r} reads no {unknown[0]!r}; it reads: {takes}")
    call = functools.partial(function, **settings)
    call(**{parameter: [] for parameter in reads})  # a setting that is wrong, or no library: it shows at once
    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return FunctionReward(call, name or kind, weight, columns=columns)


def metric(function: _Function) -> _Function:
    """A function whose keyword-only parameters are settings, which no column of a task fills.

    It reads texts; of a conversation the model's last turn.
    """
    parameters = inspect.signature(function).parameters.values()
    columns = [each for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def of_texts(completions: Sequence[Any], *others: Any, **named: Any) -> Any:
        return function([answer_text(completion) for completion in completions], *others, **named)

    of_texts.__kwdefaults__ = function.__kwdefaults__  # type: ignore[attr-defined]
    of_texts.__signature__ = inspect.Signature(columns)  # type: ignore[attr-defined]
    return cast(_Function, of_texts)


def required(library: str) -> ModuleType:
    """A library of the extra `metrics`.

    Raises:
        ConfigError: it isn't installed.
    """
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this metric needs {library} ({error}); install it by pip install 'etude[metrics]'"
        ) from error


def references(value: Any, name: str) -> list[str]:
    """The texts to compare an answer with; none where a row has no reference.

    Raises:
        RewardError: they are no texts.
    """
    several = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(several, list | tuple) or any(not isinstance(text, str) for text in several):
        raise RewardError(f"{name} is {value!r:.80}; expected a text, a list of texts, or None")
    return [text for text in several if text.strip()]
