"""The table of every command's options: names, types, defaults and help.

Importing a trainer's configuration can take seconds (transformers'). So the options are read off the
dataclasses once, by `python -m etude.app.options`, and kept in `options.json`; help and parsing read that
file. A test compares the two. Only given values reach a dataclass: its own defaults stay in force.

Left out: settings marked `hidden`, those whose type can't be written in YAML, and `_UNUSED` ones.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from etude.app.arguments import default_of
from etude.app.references import load_object

TABLE = Path(__file__).with_name("options.json")


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        summary: what it does.
        classes: the dataclasses whose fields are its options, by the titles help shows. A name that two of
            them declare belongs to the first.
        module: in `etude.app`; its `run` takes one of each.
        required: options that have to be given although their class has a default.
    """

    summary: str
    classes: Mapping[str, str]
    module: str
    required: tuple[str, ...] = ()


# What a command that plays is made of, beside its trainer's settings.
_PLAYING = {
    "Model": "etude.app.arguments:ModelArguments",
    "Tasks": "etude.app.arguments:TaskArguments",
    "Environment": "etude.app.mixed_arguments:PlayArguments",
    "Run": "etude.app.arguments:RunArguments",
}


def _without_critic(by: str, config: str) -> Command:
    return Command(
        f"Train a model on tasks that it plays, with tools, by {by}.",
        {**_PLAYING, "Training": f"etude.trainers.group_config:{config}"},
        module="group",
        required=("output_dir",),
    )


def _on_data(summary: str, module: str, config: str) -> Command:
    return Command(
        summary,
        {
            "Model": "etude.app.arguments:ModelArguments",
            "Data": "etude.app.arguments:DataArguments",
            "Run": "etude.app.arguments:RunArguments",
            "Training": f"etude.trainers.{config}",
        },
        module=module,
        required=("output_dir",),
    )


def _on_preferences(by: str, config: str) -> Command:
    return _on_data(f"Train a model on preferences, by {by}.", "preference", config)


COMMANDS = {
    "sft": _on_data("Fine-tune a model on demonstrations.", "sft", "sft_config:SFTConfig"),
    "reward": _on_data("Train a reward model on preferences.", "reward", "reward_config:RewardConfig"),
    "prm": _on_data("Train a process reward model on answers in steps.", "reward", "reward_config:PRMConfig"),
    "dpo": _on_preferences("direct preference optimisation or a variant", "dpo_config:DPOConfig"),
    "kto": _on_data(
        "Train a model on answers that are good or bad, by KTO.", "preference", "kto_config:KTOConfig"
    ),
    "orpo": _on_preferences("odds ratios, without a reference", "preference_config:ORPOConfig"),
    "simpo": _on_preferences(
        "likelihoods per token and a margin, without a reference", "preference_config:SimPOConfig"
    ),
    "cpo": _on_preferences("contrast and imitation, without a reference", "preference_config:CPOConfig"),
    "ppo": Command(
        "Train a model on tasks that it plays, with tools, by proximal policy optimisation.",
        {
            **_PLAYING,
            "Model": "etude.app.arguments:ActorCriticArguments",
            "Training": "etude.trainers.ppo_config:PPOConfig",
        },
        module="ppo",
        required=("output_dir",),
    ),
    "grpo": _without_critic("group relative policy optimisation", "GRPOConfig"),
    "rloo": _without_critic("REINFORCE with a leave-one-out baseline", "RLOOConfig"),
    "reinforce": _without_critic(
        "the policy gradient with the batch's mean as its baseline", "ReinforceConfig"
    ),
    "reinforce_plus_plus": _without_critic("REINFORCE++", "ReinforcePlusPlusConfig"),
    "iterative_sft": _without_critic("imitating its best episodes", "IterativeSFTConfig"),
    "sample": Command(
        "Let a model play tasks several times each, and make a dataset of what is good.",
        {
            "Model": "etude.app.arguments:FixedModelArguments",
            "Environment": "etude.app.arguments:EnvironmentArguments",
            "Sampling": "etude.app.sample_arguments:SampleArguments",
        },
        module="sample",
    ),
    "merge": Command(
        "Merge adapters into their base model, or average models.",
        {"Merging": "etude.app.merge_arguments:MergeArguments"},
        module="merge",
    ),
    "eval": Command(
        "Measure a model on tasks, clean and under noise, perhaps beside another model.",
        {
            "Model": "etude.app.arguments:FixedModelArguments",
            "Tasks": "etude.app.eval_arguments:EvalTaskArguments",
            "Environment": "etude.app.arguments:EnvironmentArguments",
            "Evaluation": "etude.app.eval_arguments:EvaluationArguments",
        },
        module="eval",
    ),
}

# Settings of trainers' configurations that do nothing here: the commands load the model, and the rest is
# for scripts of transformers' own.
_UNUSED = {"model_init_kwargs", "do_train", "do_eval", "do_predict", "local_rank"}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: as in the dataclass, in YAML and after `--`.
        type: a Python type, written out: `int | None`, `Literal['a', 'b']`, `list[str]`.
        default: None where there is none.
        required: it has to be given.
        help: one line.
        title: the group it belongs to, a key of `Command.classes`.
    """

    name: str
    type: str
    default: Any
    required: bool
    help: str
    title: str

    @property
    def kinds(self) -> list[str]:
        """The alternatives of its type."""
        return self.type.split(" | ")

    @property
    def choices(self) -> list[str]:
        """What it can be, where the type enumerates that."""
        literals = [kind for kind in self.kinds if kind.startswith("Literal[")]
        return [str(value) for kind in literals for value in ast.literal_eval(kind[len("Literal") :])]

    def takes(self, kind: str) -> bool:
        """Whether it can be of a kind: "bool", "list", "dict", …"""
        return any(each.partition("[")[0] == kind for each in self.kinds)


@functools.cache
def read_options(command: str) -> dict[str, Option]:
    """Options of a command by name, in the order help shows them."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))[command]
    return {row["name"]: Option(**row) for row in rows}


def describe_options(command: Command) -> dict[str, Option]:
    """The same, read off the dataclasses themselves."""
    found: dict[str, Option] = {}
    for title, reference in command.classes.items():
        for option in _options_of(load_object(reference), title):
            required = option.required or option.name in command.required
            found.setdefault(option.name, replace(option, required=required))
    return found


def options_of(*classes: type) -> dict[str, Option]:
    """Those of a few dataclasses by name, without a table."""
    return {option.name: option for cls in classes for option in _options_of(cls, cls.__name__)}


def write_table() -> None:
    table = {
        name: [dataclasses.asdict(option) for option in describe_options(command).values()]
        for name, command in COMMANDS.items()
    }
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _options_of(cls: type, title: str) -> Iterator[Option]:
    hints = typing.get_type_hints(cls)
    documented = _documented(cls)
    for field in dataclasses.fields(cls):
        written = _written(hints[field.name])
        if field.name in _UNUSED or field.metadata.get("hidden") or written in ("", "None"):
            continue
        default = default_of(field)
        required = default is MISSING
        if required:
            default = None
        elif isinstance(default, Enum):
            default = default.value
        help = field.metadata.get("help", "").replace("%%", "%")  # argparse's spelling
        help = " ".join((help or documented.get(field.name, "")).split())
        yield Option(field.name, written, default, required, help, title)


def _documented(cls: type) -> dict[str, str]:
    """What the `Attributes:` of its docstring and of those it inherits from say, by name."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")
        entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
        found |= {name: text for names, text in entries for name in names.split(", ")}
    return found


def _written(hint: Any) -> str:
    """A type as text; empty where it has no YAML form. Enumerations are written as their values."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, type(None)):
        return "None"
    if hint is Any:
        return "Any"
    if origin in (Union, types.UnionType):
        named = any(isinstance(member, type) and issubclass(member, Enum) for member in arguments)
        # `SchedulerType | str` accepts the names of the enumeration, not any text.
        parts = [_written(member) for member in arguments if not (named and member is str)]
        return " | ".join(dict.fromkeys(part for part in parts if part))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin in (list, dict):
        inner = [_written(argument) for argument in arguments]
        return f"{origin.__name__}[{', '.join(inner)}]" if all(inner) else ""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"Literal[{', '.join(repr(member.value) for member in hint)}]"
    return hint.__name__ if hint in (int, float, bool, str, list, dict) else ""


if __name__ == "__main__":
    write_table()
