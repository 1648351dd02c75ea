"""Command line and YAML: what overrules what, and what a user is told who got it wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.app.options import Option, read_options
from etude.app.parsing import parse_options
from etude.errors import ConfigError

PPO = read_options("ppo")
OPTIONAL = {name: option for name, option in PPO.items() if not option.required}


def parsed(*arguments: str) -> dict[str, Any]:
    return parse_options(OPTIONAL, arguments)


def mistake(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(*arguments)
    return str(caught.value)


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the current directory, which is named by a relative path."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 2e-4\n"
        "early_stopping: true\n"
        "tools: [examples/tools.py:search, calculator]\n"
        "reward: scores.py:exact\n"
        "score_clip: null\n"
        "generation: {max_new_tokens: 32, temperature: 1e-1}\n",
        encoding="utf-8",
    )
    return file


# ---- what overrules what ----


def test_a_file_is_read_with_its_types(run_yaml: Path) -> None:
    assert parsed("--config", "run.yaml") == {
        "learning_rate": 2e-4,
        "early_stopping": True,
        "tools": ["examples/tools.py:search", "calculator"],
        "reward": "scores.py:exact",
        "score_clip": None,
        "generation": {"max_new_tokens": 32, "temperature": 0.1},
    }


@pytest.mark.parametrize("before", [True, False])
def test_the_command_line_overrules_the_file_wherever_it_stands(run_yaml: Path, before: bool) -> None:
    arguments = ["--learning_rate", "1e-5", "--early_stopping", "false", "--generation.max_new_tokens", "64"]
    file = ["--config", "run.yaml"]
    values = parsed(*file, *arguments) if before else parsed(*arguments, *file)
    assert values["learning_rate"] == 1e-5
    assert values["early_stopping"] is False
    assert values["generation"] == {"max_new_tokens": 64, "temperature": 0.1}
    assert values["reward"] == "scores.py:exact"


def test_a_mapping_is_replaced_whole_or_item_by_item() -> None:
    assert parsed("--generation", "{top_k: 3}", "--generation.top_p=0.5") == {
        "generation": {"top_k": 3, "top_p": 0.5}
    }
    assert parsed("--generation.top_p", "0.5", "--generation", "{top_k: 3}") == {"generation": {"top_k": 3}}
    assert parsed("--tracker_kwargs.wandb.tags", "[a, b]", "--tracker_kwargs.wandb.name", "x") == {
        "tracker_kwargs": {"wandb": {"tags": ["a", "b"], "name": "x"}}
    }


def test_items_can_be_set_in_a_file_too(run_yaml: Path) -> None:
    run_yaml.write_text("generation.top_k: 4\n", encoding="utf-8")
    assert parsed("--config", "run.yaml") == {"generation": {"top_k": 4}}


def test_an_empty_file_says_nothing(run_yaml: Path) -> None:
    run_yaml.write_text("# nothing yet\n", encoding="utf-8")
    assert parsed("--config", "run.yaml") == {}


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--early_stopping"], True),
        (["--early_stopping", "--seed", "3"], True),
        (["--early_stopping", "true"], True),
        (["--early_stopping=True"], True),
        (["--early_stopping", "false"], False),
        (["--early-stopping", "false"], False),
        (["--early_stopping", "--early_stopping", "false"], False),
    ],
)
def test_flags_stand_alone_or_with_a_value(arguments: list[str], value: bool) -> None:
    assert parsed(*arguments)["early_stopping"] is value


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--resume_from_checkpoint"], True),
        (["--resume_from_checkpoint", "true"], True),
        (["--resume_from_checkpoint", "runs/x/checkpoint-3"], "runs/x/checkpoint-3"),
    ],
)
def test_resuming_takes_a_flag_or_a_path(arguments: list[str], value: bool | str) -> None:
    assert parsed(*arguments) == {"resume_from_checkpoint": value}


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--tools", "calculator"], ["calculator"]),
        (["--tools", "calculator", "a.py:b"], ["calculator", "a.py:b"]),
        (["--tools", "[calculator, a.py:b]"], ["calculator", "a.py:b"]),
        (["--tools", "[]"], []),
    ],
)
def test_lists_are_written_in_three_ways(arguments: list[str], value: list[str]) -> None:
    assert parsed(*arguments) == {"tools": value}


def test_negative_numbers_are_values_and_none_is_none() -> None:
    assert parsed("--episodes_to_log", "-1", "--score_clip", "none", "--max_tool_calls", "null") == {
        "episodes_to_log": -1,
        "score_clip": None,
        "max_tool_calls": None,
    }


# ---- numbers and texts come through as they are ----


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans())
def test_numbers_come_through(number: float, whole: int, flag: bool) -> None:
    values = parsed(f"--gamma={number}", f"--seed={whole}", f"--early_stopping={flag}")
    assert values == {"gamma": number, "seed": whole, "early_stopping": flag}
    assert math.copysign(1, values["gamma"]) == math.copysign(1, number)
    assert isinstance(values["gamma"], float)


@given(st.text().filter(lambda text: text.lower() != "null"))
def test_text_is_not_yaml(text: str) -> None:
    assert parsed(f"--prompt={text}") == {"prompt": text}


@pytest.mark.parametrize(
    "text", ["# Question", "~", "[a", "{a: 1}", "a: b", "1e3", "true", "", " a\n", "'a'", "none"]
)
def test_text_that_looks_like_yaml_is_text(text: str) -> None:
    assert parsed("--prompt", text) == {"prompt": text}


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learnin_rate", "1"], "unknown option --learnin_rate; did you mean --learning_rate?"),
        (["--learnin-rate=1"], "unknown option --learnin-rate; did you mean --learning_rate?"),
        (["--world_size", "2"], "unknown option --world_size; --help lists them all"),
        (["--generatio.top_k", "2"], "unknown option --generatio.top_k; did you mean --generation?"),
        (["--learning_rate", "fast"], "--learning_rate is 'fast'; expected a number"),
        (["--batch_size", "1.5"], "--batch_size is '1.5'; expected a whole number"),
        (["--batch_size", "true"], "--batch_size is 'true'; expected a whole number"),
        (["--score_clip", "x"], "--score_clip is 'x'; expected a number or none"),
        (["--early_stopping", "maybe"], "--early_stopping is 'maybe'; expected true or false"),
        (["--kl_penalty", "k4"], "--kl_penalty is 'k4'; expected one of kl, abs, mse, full"),
        (["--generation", "3"], "--generation is '3'; expected a mapping"),
        (["--seed.x", "3"], "--seed.x is an item of a mapping, but seed is a whole number"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "1", "2"], "--seed takes one value; it is followed by 1 2"),
        (["--generation.top_k"], "--generation.top_k needs a value"),
        (["run.yaml"], "unexpected 'run.yaml'; options start with --"),
        (["--config"], "--config needs a value"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str) -> None:
    assert mistake(*arguments) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1", "run.yaml: unknown option learnin_rate; did you mean learning_rate?"),
        ("learning_rate: fast", "run.yaml: learning_rate is 'fast'; expected a number"),
        ("learning_rate: [1]", "run.yaml: learning_rate is [1]; expected a number"),
        ("early_stopping: 1", "run.yaml: early_stopping is 1; expected true or false"),
        ("tracker_project_name: 3", "run.yaml: tracker_project_name is 3; expected text"),
        ("seed: null", "run.yaml: seed is None; expected a whole number"),
        ("tools: [1]", "run.yaml: tools is [1]; expected a list of texts"),
        ("reward: 1", "run.yaml: reward is 1; expected text or a list of texts"),
        ("- learning_rate", "run.yaml holds a list; expected a mapping of option to value"),
    ],
)
def test_mistakes_in_a_file_name_it(run_yaml: Path, text: str, message: str) -> None:
    run_yaml.write_text(text, encoding="utf-8")
    assert mistake("--config", "run.yaml") == message


def test_a_file_that_is_not_yaml_is_named_with_the_line(run_yaml: Path) -> None:
    run_yaml.write_text("a: 1\nb: [2\n", encoding="utf-8")
    assert mistake("--config", "run.yaml").startswith("run.yaml is not YAML")
    assert "line 3" in mistake("--config", "run.yaml")


def test_a_file_that_is_not_there(run_yaml: Path) -> None:
    assert mistake("--config", "runn.yaml").endswith("did you mean run.yaml?")
    assert mistake("--config", "elsewhere/x.yaml").endswith(f"paths start at {run_yaml.parent}")
    assert "can't be read" in mistake("--config", str(run_yaml.parent))
    run_yaml.write_bytes(b"prompt: \xff")
    assert "can't be read" in mistake("--config", "run.yaml")


def test_required_options_have_to_be_given() -> None:
    message = (
        r"--model_name_or_path \(directory or hub id of the model\) and --output_dir \(.*\) must be given"
    )
    with pytest.raises(ConfigError, match=message):
        parse_options(PPO, ["--train_dataset", "t.jsonl"])
    given = {"model_name_or_path": "m", "train_dataset": "t.jsonl", "output_dir": "runs/x"}
    assert parse_options(PPO, [f"--{name}={value}" for name, value in given.items()]) == given


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_every_default_is_of_its_options_type(command: str) -> None:
    """So no type in the table is one that values can't be read as."""
    checked = 0
    for name, option in read_options(command).items():
        if not option.required and option.default not in (None, [], {}):
            assert parse_options({name: option}, [f"--{name}={option.default}"])[name] == option.default
            checked += 1
    assert checked > 20


def test_an_enumeration_inside_a_list_is_checked() -> None:
    option = Option("debug", "str | list[Literal['a', 'b']]", "", False, "", "Training")
    assert parse_options({"debug": option}, ["--debug", "a", "b"]) == {"debug": ["a", "b"]}
    with pytest.raises(ConfigError, match="expected text or a list of texts"):
        parse_options({"debug": option}, ["--debug", "a", "c"])
