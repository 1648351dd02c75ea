"""What may be known of an environment beside `play` and `score`: it is read here, and nowhere else.

`protocols.Environment` has two methods. What else an environment has is made use of:

    tokenizer           of the model that plays; without one, it has to be given to whoever trains the model
    max_length          tokens of an episode at most, for the sampler's memory; else the model's own limit
    params              `SamplingParams` of a turn: training has to learn at the temperature it samples at
    generation_kwargs   of a turn: they may choose what an encoder–decoder's decoder begins with
    environments        of a mixed one, by name; with their `weights`
    tools               by name, for noise in what they reply
    prompt_text(task)   the text an episode begins with, to recognise a task by
    metrics(episodes)   what an evaluation says about all its episodes together
    sampler             what plays, where nobody brings a sampler; `slots` says how many episodes at once
    next_seed()         seeds of the episodes, where nobody brings them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from etude.environments.running import Seeds
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError
from etude.protocols import Environment, Sampler
from etude.sampling.params import decoder_start
from etude.types import Episode


def check_environment(environment: Any) -> Environment:
    """The environment, if it is one.

    Raises:
        ConfigError: it lacks `play` or `score`.
    """
    if isinstance(environment, Environment):
        return environment
    raise ConfigError(
        f"environment is a {type(environment).__name__}; expected something with play(task, sampler, seed=) "
        "and score(episodes), such as a TextEnvironment"
    )


def parts_of(environment: Environment | None) -> Mapping[str, Environment]:
    """The environments of a mixed one by name; none for any other."""
    return getattr(environment, "environments", {})


def weights_of(environment: Environment | None) -> Mapping[str, float] | None:
    """How often those of a mixed one are played; None: in proportion to their tasks."""
    return getattr(environment, "weights", None)


def name_of(environment: Environment | None, task: Mapping[str, Any]) -> str:
    """Which environment of a mixed one plays a task; "" for any other.

    Raises:
        DataError: the task names none of them.
    """
    naming: Callable[[Mapping[str, Any]], str] | None = getattr(environment, "name_of", None)
    return "" if naming is None else naming(task)


def tokenizer_of(environment: Environment | None) -> PreTrainedTokenizerBase | None:
    return getattr(environment, "tokenizer", None)


def max_length_of(environment: Environment | None) -> int | None:
    """Tokens of an episode at most; None for the model's own limit."""
    return getattr(environment, "max_length", None)


def temperatures_of(environment: Environment | None) -> dict[str, float]:
    """What it samples at, by the name in a mixed environment; nothing where that isn't known."""
    parts = {"": environment, **parts_of(environment)}
    params = {name: getattr(part, "params", None) for name, part in parts.items()}
    return {name: each.temperature for name, each in params.items() if each is not None}


def starts_of(environment: Environment | None, own: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What an encoder–decoder's decoder begins with there, each beginning once.

    Args:
        own: with what it begins where nothing else is asked for.
    """
    parts = [environment, *parts_of(environment).values()]
    settings = [getattr(part, "generation_kwargs", None) for part in parts]
    return list(dict.fromkeys(decoder_start(each, own) for each in settings))


def tools_of(environment: Environment) -> dict[str, Any]:
    """Tools by name, of all environments of a mixed one."""
    found = dict(getattr(environment, "tools", None) or {})
    for part in parts_of(environment).values():
        found |= tools_of(part)
    return found


def prompt_of(environment: Environment, task: Mapping[str, Any]) -> str | None:
    """What an episode of this task begins with; None where that isn't known before it is played."""
    writing = getattr(environment, "prompt_text", None)
    return None if writing is None else writing(task)


def metrics_of(environment: Environment) -> Callable[[Sequence[Episode]], dict[str, float]] | None:
    """What says something about an evaluation's episodes together; of a mixed one under each one's name."""
    if parts := parts_of(environment):
        saying = {name: measure for name, part in parts.items() if (measure := metrics_of(part)) is not None}

        def measure_each(episodes: Sequence[Episode]) -> dict[str, float]:
            found: dict[str, float] = {}
            for name, measure in saying.items():
                own = [episode for episode in episodes if episode.environment == name]
                found |= {f"{name}/{key}": value for key, value in (measure(own) if own else {}).items()}
            return found

        return measure_each if saying else None
    if isinstance(environment, TextEnvironment) and type(environment).metrics is TextEnvironment.metrics:
        return None
    return getattr(environment, "metrics", None)


def sampler_of(environment: Environment, given: Sampler | None = None) -> Sampler:
    """The sampler that is given, else the environment's own.

    Raises:
        ConfigError: there is neither.
    """
    sampler = given if given is not None else getattr(environment, "sampler", None)
    if sampler is None:
        raise ConfigError(f"a {type(environment).__name__} has no sampler of its own; pass sampler=")
    return sampler


def slots_of(environment: Environment) -> int:
    """How many episodes its sampler plays at once."""
    return getattr(environment, "slots", 32)


def seeds_of(environment: Environment) -> Callable[[], int]:
    """The environment's own seeds, else new ones."""
    return getattr(environment, "next_seed", None) or Seeds()
