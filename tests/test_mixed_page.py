"""docs/mixed.md: snippets run as they are printed, and so does the command."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from etude.app.cli import main
from etude.environments.mixed import MixedEnvironment
from etude.runtime.run import RunDirectory
from etude.tools.calculator import calculator

PAGE = (Path(__file__).parents[1] / "docs" / "mixed.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
REWARD = """
def exact(completions, answer, **columns):
    return [float(str(a) in text) for text, a in zip(completions, answer, strict=True)]
"""


@pytest.fixture
def names(tokenizer, make_llama, tmp_path, monkeypatch):
    """What a reader brings along."""
    monkeypatch.chdir(tmp_path)
    scope = {"tokenizer": tokenizer, "model": make_llama(), "calculator": calculator}
    exec(REWARD, scope)
    return scope


def test_a_mixed_run(names, capsys):
    exec(SNIPPETS[0], names)
    assert isinstance(names["env"], MixedEnvironment)
    played = RunDirectory("runs/mixed").read_episodes(split="train")
    assert Counter(episode.environment for episode in played) == {"calculator": 16, "translation": 8}
    assert "'chrf'" in capsys.readouterr().out.splitlines()[-1]
    reported = RunDirectory("runs/mixed").read_metrics()[0]
    for name in re.findall(r"`((?:calculator|translation)/[\w/]+)`", PAGE):
        assert name in reported
    assert "calculator/reward" in re.findall(r"`([\w/]+)`", PAGE)


def test_the_command(names, capsys):
    names["model"].save_pretrained("model")
    names["tokenizer"].save_pretrained("model")
    Path("rewards.py").write_text(REWARD)
    rows = [{"prompt": f"what is {n}*7?", "answer": 7 * n} for n in range(8)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"source": word, "target": digit} for word, digit in (("two", "2"), ("drei", "3"))]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    Path("mixed.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    command = re.search(r"```\n(etude ppo .*?)```", PAGE, re.DOTALL)[1]
    assert main([*shlex.split(command)[1:], "--disable_progress"]) == 0
    played = RunDirectory("runs/mixed-cli").read_episodes(split="train")
    assert Counter(episode.environment for episode in played) == {"calculator": 12, "translation": 12}
    assert re.search(r"  translation: reward [\d.]+ → [\d.]+, success", capsys.readouterr().out)


def test_any_environment(names):
    exec(SNIPPETS[0].splitlines()[0], names)
    exec(SNIPPETS[1], names)
    metrics = RunDirectory("runs/shout").read_metrics()
    assert [row["step"] for row in metrics] == [1, 2]
    assert "reward" in metrics[0]


def test_what_the_page_points_to_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / link).exists(), link
