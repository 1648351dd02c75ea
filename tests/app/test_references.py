"""Code by name: files, modules, short names, and what is said when there is nothing by that name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from etude.app.references import load_object
from etude.errors import ConfigError
from etude.tools.calculator import calculator


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with code in it."""
    (tmp_path / "my_tools.py").write_text(
        "import dataclasses\n"
        "calls = []\n"
        "@dataclasses.dataclass\n"
        "class Box:\n    content: int = 3\n"
        "box = Box()\n"
        "def search(query: str) -> str:\n    return query[::-1]\n",
        encoding="utf-8",
    )
    package = tmp_path / "workshop_package"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "scores.py").write_text(
        "def exact(prompts, completions):\n    return [1.0]\n", encoding="utf-8"
    )
    (package / "hungry.py").write_text("import no_such_dependency\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "failing.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def refusal(reference: str, home: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_object(reference, home)
    return str(caught.value)


def test_a_file_starts_at_the_current_directory(workshop: Path) -> None:
    assert load_object("my_tools.py:search")("abc") == "cba"
    assert load_object("./my_tools.py:box.content") == 3


def test_a_file_is_run_once_however_it_is_named(workshop: Path) -> None:
    first = load_object("my_tools.py:calls")
    assert load_object(f"{workshop}/my_tools.py:calls") is first


def test_files_of_one_name_are_two_modules(workshop: Path) -> None:
    other = workshop / "other"
    other.mkdir()
    (other / "my_tools.py").write_text("calls = 'other'\n", encoding="utf-8")
    assert load_object("my_tools.py:calls") == []
    assert load_object("other/my_tools.py:calls") == "other"


def test_a_package_starts_at_the_current_directory(workshop: Path) -> None:
    assert load_object("workshop_package.scores:exact")([], []) == [1.0]


def test_installed_packages_are_found_too() -> None:
    assert load_object("etude.tools.calculator:calculator") is calculator
    assert load_object("json:decoder.JSONDecoder").__name__ == "JSONDecoder"


def test_what_ships_has_a_short_name() -> None:
    assert load_object("calculator", "etude.tools") is calculator


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("my_tools.py:serch", "there is no 'serch' in my_tools.py; did you mean search?"),
        ("my_tools.py:box.contents", "there is no 'contents' in my_tools.py; did you mean content?"),
        (
            "workshop_package.scores:exakt",
            "there is no 'exakt' in workshop_package.scores; did you mean exact?",
        ),
        (":search", "':search' is no code reference; expected file.py:name or package.module:name"),
        ("my_tools.py:", "'my_tools.py:' is no code reference; expected file.py:name or package.module:name"),
        ("search", "'search' is no code reference; expected file.py:name or package.module:name"),
        ("failing.py:f", "importing failing.py failed: ZeroDivisionError: division by zero"),
    ],
)
def test_mistakes(workshop: Path, reference: str, message: str) -> None:
    assert refusal(reference) == message


def test_a_file_that_is_not_there(workshop: Path) -> None:
    message = refusal("my_tool.py:search")
    assert message == f"there is no file my_tool.py (in {workshop}); did you mean my_tools.py?"
    assert refusal("nowhere/tools.py:search") == f"there is no file nowhere/tools.py (in {workshop})"


def test_a_module_that_is_not_there(workshop: Path) -> None:
    assert refusal("no_such_package.scores:exact").startswith("there is no module 'no_such_package'")
    assert refusal("workshop_package.score:exact").startswith("there is no module 'workshop_package.score'")


def test_a_module_whose_imports_fail_is_not_called_missing(workshop: Path) -> None:
    message = refusal("workshop_package.hungry:f")
    assert message.startswith("importing workshop_package.hungry failed: ModuleNotFoundError")
    assert "no_such_dependency" in message


def test_a_file_that_fails_is_tried_again(workshop: Path) -> None:
    assert "SyntaxError" in refusal("broken.py:f")
    (workshop / "broken.py").write_text("def f():\n    return 'mended'\n", encoding="utf-8")
    assert load_object("broken.py:f")() == "mended"


def test_short_names_that_nothing_has() -> None:
    message = "etude.tools ships nothing named 'calculater'; did you mean calculator?"
    assert refusal("calculater", "etude.tools") == message
    # A module of ours, but no tool: its name is not offered.
    assert "did you mean" not in refusal("contract", "etude.tools")


def test_arguments_make_an_object(workshop: Path) -> None:
    assert load_object("my_tools.py:Box()").content == 3
    assert load_object("my_tools.py:Box(content=(5))").content == 5
    assert load_object("./my_tools.py:Box('a:b(c)')").content == "a:b(c)"
    penalty = load_object("etude:OverlongPenalty(512, cache_length=128, weight=0.5)", "etude.rewards")
    assert (penalty.max_length, penalty.cache_length, penalty.weight) == (512, 128, 0.5)
    assert load_object("calculator('1+2')", "etude.tools") == load_object("calculator", "etude.tools")("1+2")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "my_tools.py:Box(contents=1)",
            "my_tools.py:Box can't be called with (contents=1): got an unexpected",
        ),
        ("etude:OverlongPenalty(5)", "can't be called with (5): missing a required argument: 'cache_length'"),
        ("my_tools.py:Box(other)", "the arguments of my_tools.py:Box(other) can't be read; expected numbers"),
        ("my_tools.py:Box(1, *[2])", "can't be read"),
        ("my_tools.py:Box(**{'content': 1})", "can't be read"),
        ("my_tools.py:Box(1)+Box(2)", "can't be read"),
        ("my_tools.py:Box(1).x(2)", "can't be read"),
        ("my_tools.py:Box(1", "there is no 'Box(1' in my_tools.py; did you mean Box?"),
        ("my_tools.py:calls()", "my_tools.py:calls is [], which takes no arguments; leave out ()"),
        ("my_tools.py:Bax(1)", "there is no 'Bax' in my_tools.py; did you mean Box?"),
    ],
)
def test_arguments_that_make_none(workshop: Path, reference: str, message: str) -> None:
    assert message in refusal(reference)
