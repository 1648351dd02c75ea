"""The option table is what the dataclasses say, and its types can be written."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from etude.app.options import COMMANDS, Command, Option, describe_options, read_options
from etude.trainers.ppo_config import PPOConfig


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_table_is_up_to_date(command: str) -> None:
    """If this fails: python -m etude.app.options"""
    written, declared = read_options(command), describe_options(COMMANDS[command])
    assert list(written) == list(declared)
    for name, option in declared.items():
        assert written[name] == option


def test_every_setting_of_ppo_is_an_option_but_the_hidden_ones() -> None:
    fields = {field.name: field for field in dataclasses.fields(PPOConfig)}
    options = read_options("ppo")
    hidden = {name for name, field in fields.items() if field.metadata.get("hidden")}
    assert set(fields) - set(options) == hidden
    assert "world_size" not in options
    elsewhere = {name for name in fields if name in options and options[name].title != "Training"}
    assert elsewhere == {"reward_model"}  # to trackers a name, here the model itself


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_option_says_what_it_is_for(command: str) -> None:
    assert [name for name, option in read_options(command).items() if not option.help] == []


class Pace(Enum):
    SLOW = "slow"
    FAST = "fast"


@dataclasses.dataclass
class PetArguments:
    """Pets.

    Attributes:
        optional, union: explained
            here.
        literal: one of two.
        plain: not what the field says.
    """

    plain: int = dataclasses.field(metadata={"help": "a  number\n of %%"})
    optional: Optional[float] = None  # noqa: UP045  # as transformers writes some of its own
    union: Union[str, list[str], None] = "x"  # noqa: UP007
    literal: Literal["a", "b"] = "a"
    pace: Pace | str = Pace.SLOW
    paces: list[Pace] = dataclasses.field(default_factory=list)
    mapping: dict[str, Any] | None = None
    partly: Path | bool = False
    unwritable: Path | None = None
    unwritable_list: list[Path] = dataclasses.field(default_factory=list)
    hidden: int = dataclasses.field(default=0, metadata={"hidden": True})
    do_train: bool = False


def test_types_are_written_out() -> None:
    options = describe_options(Command("", {"Pets": f"{__file__}:PetArguments"}, "pets"))
    assert {name: option.type for name, option in options.items()} == {
        "plain": "int",
        "optional": "float | None",
        "union": "str | list[str] | None",
        "literal": "Literal['a', 'b']",
        "pace": "Literal['slow', 'fast']",
        "paces": "list[Literal['slow', 'fast']]",
        "mapping": "dict[str, Any] | None",
        "partly": "bool",
    }
    assert options["plain"] == Option("plain", "int", None, True, "a number of %", "Pets")
    assert {name: option.help for name, option in options.items() if option.help} == {
        "plain": "a number of %",
        "optional": "explained here.",
        "union": "explained here.",
        "literal": "one of two.",
    }
    assert options["pace"].default == "slow"
    assert options["paces"].default == []


def test_a_name_belongs_to_the_class_that_declares_it_first() -> None:
    options = describe_options(COMMANDS["sft"])
    assert options["resume_from_checkpoint"].title == "Run"
    assert options["resume_from_checkpoint"].takes("bool")


def test_what_an_option_takes() -> None:
    option = Option("debug", "str | list[Literal['a', 'b']] | None", "", False, "", "")
    assert [kind for kind in ("str", "list", "None", "int", "Literal") if option.takes(kind)] == [
        "str",
        "list",
        "None",
    ]
    assert option.choices == []
    assert Option("pace", "Literal['slow', 'fast'] | None", "", False, "", "").choices == ["slow", "fast"]


def test_a_command_can_require_what_its_class_doesnt() -> None:
    classes = {"Pets": f"{__file__}:PetArguments"}
    options = describe_options(Command("", classes, "pets", required=("pace",)))
    assert [name for name, option in options.items() if option.required] == ["plain", "pace"]
    assert read_options("ppo")["output_dir"].required
