"""docs/environments.md: snippets run as they are printed, tables say what is."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from sequence_models import make_t5
from transformers import AutoModelForSequenceClassification

import etude
from etude.app.arguments import ENVIRONMENTS
from etude.app.cli import main
from etude.environments.summarization import WEIGHTS
from etude.environments.text import _OPEN
from etude.runtime.run import RunDirectory

PAGE = (Path(__file__).parents[1] / "docs" / "environments.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROWS = [{"translation": {"en": f"{i} houses", "de": f"{i} haeuser"}} for i in range(8)]


@pytest.fixture(params=["llama", "t5"])
def names(request, tokenizer, make_llama, tmp_path, monkeypatch):
    """What a reader brings along."""
    monkeypatch.chdir(tmp_path)
    config = make_llama().config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained("reward-model")
    tokenizer.save_pretrained("reward-model")
    return {
        "model": make_llama() if request.param == "llama" else make_t5(tokenizer),
        "tokenizer": tokenizer,
        "reviews": [{"review": f"the film number {i} was long and odd"} for i in range(4)],
        "articles": [
            {"article": f"the old cat number {i} sat on a mat", "highlights": "a cat sat"} for i in range(2)
        ],
        "brevity": lambda completions: [-float(len(text)) for text in completions],
    }


def test_continuations(names):
    exec(SNIPPETS[0], names)
    assert all(2 <= len(query) < 8 for query in names["queries"])
    assert all(int(mask.sum()) <= 15 for mask in names["masks"])


def test_translation(names, capsys):
    exec(SNIPPETS[1], names)
    assert "translate English to German: The house is old."[: len("translate")] in names["histories"][0].text
    assert "'chrf':" in capsys.readouterr().out
    assert {given.name for given in names["histories"][1].episode.rewards} == {"chrf", "ter"}


def test_summaries(names, capsys):
    exec(SNIPPETS[2], names)
    assert names["histories"][0].episode.prompt == "the old cat number 0 sat on a mat\n\nTL;DR:"
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[0]: float(line[2]) for line in printed} == WEIGHTS
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*\| (\S+?)(?: each)? \|$", PAGE, re.MULTILINE)
    weights = {name: {"⅓": 1 / 3}.get(w) or float(w) for row, w in rows for name in re.findall(r"\w+", row)}
    assert weights == WEIGHTS


def test_one_s_own(make_llama, tokenizer, tmp_path, monkeypatch):
    environment, test, title = SNIPPETS[3:]
    assert len([line for line in environment.splitlines() if line.strip()]) <= 25
    monkeypatch.chdir(tmp_path)
    Path("countdown.py").write_text(environment, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {}
    exec("from countdown import *", names)
    exec(test, names)
    names["test_countdown"](make_llama(), tokenizer)
    sys.modules.pop("countdown")
    names |= {"model": make_llama(), "tokenizer": tokenizer, "brevity": lambda completions: [0.0]}
    exec(title, names)
    [history] = names["env"].run([{"text": "a cat sat"}])[-1]
    assert history.episode.prompt == "a cat sat\n\nTitle:"

    make_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("tasks.jsonl").write_text('{"numbers": [3, 4, 5], "target": 17}\n' * 4, encoding="utf-8")
    options = "--model_name_or_path=model --train_dataset=tasks.jsonl --output_dir=out --disable_progress"
    sizes = "--steps=4 --batch_size=4 --generation.max_new_tokens=8"
    assert main(["ppo", "--environment=countdown.py:Countdown", *options.split(), *sizes.split()]) == 0
    assert all(e.prompt == "make 17 of 3 4 5. " for e in RunDirectory("out").read_episodes(split="train"))


def test_the_command(make_llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    [settings] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("translation.yaml").write_text(settings, encoding="utf-8")
    [command] = re.findall(r"```\n(etude .*?)```", PAGE, re.DOTALL)
    sizes = ["--steps=8", "--batch_size=8", "--eval_steps=1", "--disable_progress"]
    assert main([*shlex.split(command)[1:], *sizes]) == 0
    run = RunDirectory("runs/translation")
    assert {"validation/chrf", "validation/bleu", "validation/ter"} <= run.read_metrics()[-1].keys()
    assert run.read_episodes(split="train")[0].reward_totals["ter"].weight == 0.2


def test_the_tables():
    rows = re.findall(r"^\| `(\w+Environment)` \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert {name: f"{etude._EXPORTS[kind]}:{kind}" for kind, name in rows} == ENVIRONMENTS
    assert set(re.findall(r"^\| `(\w+)\((?:task|episodes?)\)` \|", PAGE, re.MULTILINE)) == _OPEN
