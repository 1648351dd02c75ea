"""docs/evaluation.md: its code runs, its tables are the code's."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from etude.app.eval import load_noises
from etude.app.options import read_options
from etude.data.noise import SHIPPED, CharacterNoise
from etude.evaluation.evaluate import Evaluation
from etude.tools.calculator import calculator

PAGE = (Path(__file__).parents[1] / "docs/evaluation.md").read_text("utf-8")


def table(heading):
    """The cells of the rows below a table's heading."""
    [rows] = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]


@pytest.fixture(scope="module")
def names(make_llama, make_gpt2, tokenizer):
    """What the snippet leaves behind."""
    [snippet] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

    def exact(completions, answer):
        return [float(str(a) in text) for text, a in zip(completions, answer, strict=True)]

    tasks = [{"prompt": f"what is {i}+1?", "answer": i + 1} for i in range(6)]
    given = {"model": make_llama(), "other_model": make_gpt2(), "tokenizer": tokenizer}
    found = {**given, "calculator": calculator, "exact": exact, "tasks": tasks}
    exec(snippet, found)
    return found


def test_the_snippet(names):
    assert list(names["evaluation"].measures) == ["clean", "typos", "loud", "tool_injection"]
    assert names["success"].low <= names["success"].value <= names["success"].high
    assert names["first"].task["answer"] == 1
    mine, theirs = (
        each.measures["clean"]["success"].value for each in (names["evaluation"], names["before"])
    )
    assert names["gained"].value == pytest.approx(mine - theirs)


def shape_of(name):
    for pattern, shape in ((r"@\d+$", "@k"), (r"_\d+$", "_n"), (r"^stop/.*", "stop/<reason>")):
        name = re.sub(pattern, shape, name)
    return name


def test_every_measure_is_on_the_page_and_nothing_else(names):
    said = [name for cells in table("measure") for name in re.findall(r"`(.*?)`", cells[0])]
    evaluation: Evaluation = names["evaluation"]
    measured = {name for measures in evaluation.measures.values() for name in measures}
    shapes = {
        re.sub(r"@\d+$", "@k", re.sub(r"_\d+$", "_n", re.sub(r"^stop/.*", "stop/<reason>", name)))
        for name in measured
    }
    rare = {"rewards/<name>", "tool_errors/<class>"}  # several rewards, errors that occurred
    shapes -= {name for name in shapes if name.startswith("tool_errors/")}
    assert shapes | rare == set(said)


def test_every_noise_and_argument_is_on_the_page():
    said = {re.findall(r"`(\w+)`", cells[0])[0]: cells[2] for cells in table("name")}
    assert set(said) == set(SHIPPED)
    for name, arguments in said.items():
        fields = {field.name: field.default for field in dataclasses.fields(SHIPPED[name])}
        assert set(re.findall(r"`(\w+)`", arguments)) == fields.keys() - {"name"}
        for argument, default in re.findall(r"`(\w+)` ([\d.]+)", arguments):
            assert fields[argument] == float(default)


def test_the_yaml_is_of_the_commands_options():
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    settings = yaml.safe_load(text)
    options = read_options("eval")
    assert settings.keys() <= options.keys()
    needed = {name for name, option in options.items() if option.required}
    assert needed - settings.keys() == {"model_name_or_path"}
    assert len(load_noises(settings["noise"], list(SHIPPED))) == 3
    for option in re.findall(r"`--?(\w+)`", PAGE):
        assert option in options


def test_what_is_protected_can_be_said_as_the_page_says_it():
    [reference] = re.findall(r"`(characters\(protect=.*?\))`", PAGE)
    [noise] = load_noises([reference], []).values()
    assert isinstance(noise, CharacterNoise)
    noisy = dataclasses.replace(noise, rate=1.0)("Ann is not tall", 0)
    assert "Ann" in noisy
    assert "not" in noisy
    assert "tall" not in noisy
