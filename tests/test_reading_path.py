"""docs/reading-path.md, held against what an iteration of PPO with a tool really calls.

Lines are those of the functions that ran, without docstrings, comments and blank lines.
"""

import ast
import re
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

import etude
from etude import PPOConfig, PPOTrainer, TextEnvironment
from etude.tools import running
from etude.tools.calculator import calculator

SOURCE = Path(etude.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "reading-path.md"
LEFT_OUT = ("sampling", "models", "runtime", "reporting")  # folders

# What may change without the page being wrong: lines of a file, share of all lines.
LINES, SHARE = 8, 0.03
LARGE = 5  # from so many lines on, a function of a file on the path is named

TASKS = [{"prompt": f"what is {i}+{i}?", "answer": 2 * i} for i in range(4)]


class Script:
    """Makes the model call the calculator, then submit its answer or, for odd tasks, another one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, input_ids, scores):
        text = self.tokenizer.decode(input_ids[0])
        number = int(re.match(r"what is (\d)", text)[1])
        turns = [f"<request><calculator>{number}+{number}<call>", f"={2 * number + number % 2}<submit>"]
        written = re.split(r"\?|<response>", text)[1:]
        said = self.tokenizer.encode(turns[len(written) - 1])
        forced = torch.full_like(scores, -torch.inf)
        forced[0, said[len(self.tokenizer.encode(written[-1]))]] = 0.0
        return forced


def exact(completions, answer):
    return [float(text.endswith(f"={a}<submit>")) for text, a in zip(completions, answer, strict=True)]


class Calls:
    """Notes which functions of the library are called while it is entered, in any thread that starts then.

    `functions` are (file, line of the definition), in the order of their first call.
    """

    def __init__(self):
        self.functions = {}

    def __call__(self, frame, event, argument):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(SOURCE)):
            place = Path(file).relative_to(SOURCE).as_posix(), frame.f_code.co_firstlineno
            self.functions.setdefault(place, len(self.functions))

    def __enter__(self):
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.fixture(scope="module")
def called(make_llama, tokenizer, tmp_path_factory):
    """The functions that an iteration calls, in order: {file: {qualified name: definition}}.

    A run's second iteration: in the first one, things are made that are then kept.
    """
    torch.manual_seed(0)
    environment = TextEnvironment(
        None,
        tokenizer,
        tools=[calculator],
        rewards=exact,
        generation_kwargs={"max_new_tokens": 40, "logits_processor": [Script(tokenizer)]},
    )
    config = PPOConfig(
        output_dir=str(tmp_path_factory.mktemp("run")),
        batch_size=4,
        mini_batch_size=2,
        steps=8,
        disable_progress=True,
    )
    trainer = PPOTrainer(config, make_llama(), environment=environment, train_dataset=TASKS)
    iterate, played, calls = trainer._iterate, [], Calls()

    def observed(run, display):
        if trainer.current_step == 0:
            iterate(run, display)
        else:
            with pytest.MonkeyPatch.context() as patch, calls:
                patch.setattr(running, "THREADS", running.Threads())  # threads that start now are observed
                iterate(run, display)
            played.extend(run.read_episodes(split="train")[-4:])

    trainer._iterate = observed
    trainer.train()
    assert [call.error for episode in played for call in episode.tool_calls] == [None] * 4
    assert sorted(episode.reward for episode in played) == [0.0, 0.0, 1.0, 1.0]

    found = {}
    for file, line in calls.functions:
        if line in definitions(file):  # else a lambda or a comprehension, which belong to their function
            name, node = definitions(file)[line]
            found.setdefault(file, {})[name] = node
    return found


@cache
def definitions(file):
    """{first line: (qualified name, definition)} of a file's functions, nested ones included."""
    found = {}

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                walk(child, prefix)
                continue
            if not isinstance(child, ast.ClassDef):
                found[first_line(child)] = prefix + child.name, child
            walk(child, f"{prefix}{child.name}.")

    walk(ast.parse((SOURCE / file).read_text("utf-8")), "")
    return found


def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def lines_of(file, nodes):
    """How many lines these definitions have, without docstrings, comments and blank lines."""
    lines = set()
    for node in nodes:
        lines |= set(range(first_line(node), node.end_lineno + 1))
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(inner):
                lines -= set(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    text = (SOURCE / file).read_text("utf-8").splitlines()
    return sum(1 for n in lines if text[n - 1].strip() and not text[n - 1].strip().startswith("#"))


@dataclass
class Stop:
    """A file on the page's path: how many lines it says, and the functions that it names."""

    file: str
    lines: int
    read: list[str]
    later: list[str]


def the_path():
    stops = []
    for section in re.split(r"^## (?=\d)", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        section = section.partition("\n## ")[0]
        number, file, link, lines = re.match(r"(\d+)\. \[`(.*?)`\]\((.*?)\): (\d+) lines\n", section).groups()
        assert int(number) == len(stops) + 1
        assert (PAGE.parent / link).resolve() == SOURCE / file
        read, later = (
            re.findall(r"`(\w[\w.]*)`", text[1]) if text else []
            for text in (
                re.search(rf"^{word}: ([^*]*?)(?:\n\n|\Z|\nLater)", section, re.M)
                for word in ("Read", "Later")
            )
        )
        stops.append(Stop(file, int(lines), read, later))
    return stops


def qualified(name, functions):
    """The function that the page calls `name`, perhaps without its class."""
    [found] = [full for full in functions if full == name or full.endswith("." + name)] or [None]
    return found


def test_the_files_are_those_that_a_step_goes_through_in_its_order(called):
    counted = [file for file in called if not file.startswith(LEFT_OUT)]
    path = [stop.file for stop in the_path()]
    assert path == [file for file in counted if file in path]
    also = re.findall(r"^\| `(.*?)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert sorted([*path, *also]) == sorted(counted)


def test_functions_that_the_page_names_are_called_and_large_ones_are_named(called):
    for stop in the_path():
        functions = called[stop.file]
        read, later = ([qualified(name, functions) for name in names] for names in (stop.read, stop.later))
        assert None not in read + later, f"{stop.file}: {stop.read + stop.later}, and called: {[*functions]}"
        assert read == [name for name in functions if name in read], "in the order of their first call"
        large = {name for name, node in functions.items() if lines_of(stop.file, [node]) >= LARGE}
        assert large - {*read, *later} == set(), f"{stop.file}: not on the page"


def test_the_lines_are_counted_right(called):
    path, text = the_path(), PAGE.read_text("utf-8")
    counted = {f: lines_of(f, nodes.values()) for f, nodes in called.items() if not f.startswith(LEFT_OUT)}
    measured = {stop.file: counted[stop.file] for stop in path}
    total, rest = sum(measured.values()), sum(counted.values()) - sum(measured.values())
    right = f"{total} lines on the path, {rest} beside it: {measured}"
    for stop in path:
        assert stop.lines == pytest.approx(measured[stop.file], abs=LINES), f"{stop.file}; {right}"
    said, files = map(int, re.search(r"\*\*(\d+) lines in (\d+) files\*\*", text).groups())
    assert (said, files) == (sum(stop.lines for stop in path), len(path))
    assert said == pytest.approx(total, rel=SHARE), right
    assert int(re.search(r"another (\d+) lines", text)[1]) == pytest.approx(rest, rel=SHARE), right


def test_where_the_step_leaves_the_path(called):
    """The page's doors to what isn't counted are those that the step goes through."""
    doors = re.findall(r"^- `(\w+)/`.*?: (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert [folder for folder, _ in doors] == list(LEFT_OUT)
    for folder, names in doors:
        inside = [name for file, functions in called.items() if file.startswith(folder) for name in functions]
        for name in re.findall(r"`(\w[\w.]*)`", names):
            assert name in inside
