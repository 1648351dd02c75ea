"""The reviews example: its data, what watches, and the three stages in a few steps each."""

import importlib.util
import random
import re
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from etude.app.cli import main as etude
from etude.app.references import load_object
from etude.data.files import load_rows
from etude.runtime.loop import run_sync
from etude.runtime.run import RunDirectory
from etude.types import Episode, Segment

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("reviews_example", ROOT / "examples" / "reviews.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demonstrations_are_grammatical_and_mostly_bad(example):
    rng = random.Random(0)
    rows = [example.demonstration(rng) for _ in range(2000)]
    texts = [row["prompt"] + row["completion"] for row in rows]
    assert all(map(example.is_grammatical, texts))
    assert len(set(texts)) > 1500
    assert sum(example.balance(text.split()) for text in texts) / len(texts) == pytest.approx(-0.8, abs=0.1)


@pytest.mark.parametrize(
    "text",
    [
        " the plot was",
        " the plot was dull",
        " the plot was dull superb .",
        " the plot was dull and .",
        " i loved the plot",
        "the plot was dull .",
    ],
)
def test_what_is_not_grammatical(example, text):
    assert not example.is_grammatical(text)


def test_readers_prefer_better_reviews_most_of_the_time(example):
    rng = random.Random(0)
    pairs = [example.preference(rng) for _ in range(2000)]
    margins = [example.balance(p["chosen"].split()) - example.balance(p["rejected"].split()) for p in pairs]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    clear = [margin for margin in margins if margin]
    assert 0.85 < sum(margin > 0 for margin in clear) / len(clear) < 0.97


def test_what_watches_counts_nothing(example):
    def play(prompt, completion):
        return Episode(
            {"prompt": prompt}, [Segment("prompt", prompt, [1]), Segment("model", completion, [2])]
        )

    episodes = [
        play(" i", " loved the plot and the cast was superb ."),
        play(" the plot", " was really dull ."),
        play(" the plot", " was really ."),
    ]
    assert run_sync(example.sentiment(episodes)) == [2.0, -1.0, 0.0]
    assert run_sync(example.grammatical(episodes)) == [1.0, 1.0, 0.0]
    assert example.sentiment.weight == example.grammatical.weight == 0.0


def test_each_word_is_a_token(example, tmp_path):
    example.write_model(tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(["", *example.WORDS])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(set(ids)) == len(example.WORDS)
    assert tokenizer.unk_token_id not in ids


def test_the_whole_way(example, tmp_path, monkeypatch, capsys):
    """What the example does, with a few steps of each kind: it is the three commands and their files."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(example, "SIZES", {**dict.fromkeys(example.SIZES, 64), "held_out_prompts": 8})
    example.write_data(tmp_path / "data", seed=0)
    assert len(load_rows(tmp_path / "data" / "preferences.jsonl")) == 64
    example.write_model(tmp_path / "model", seed=0)

    def run(command, **options):
        words = [f"--config=examples/reviews_{command}.yaml", *(f"--{k}={v}" for k, v in options.items())]
        assert etude([command, *words]) == 0

    data = tmp_path / "data"
    run(
        "sft",
        model_name_or_path=tmp_path / "model",
        train_dataset=data / "reviews.jsonl",
        output_dir=tmp_path / "sft",
        max_steps=3,
    )
    run(
        "reward",
        model_name_or_path=tmp_path / "sft",
        train_dataset=data / "preferences.jsonl",
        eval_dataset=data / "held_out_preferences.jsonl",
        output_dir=tmp_path / "reward_model",
        max_steps=2,
        eval_steps=2,
    )
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model").num_labels == 1
    run(
        "ppo",
        model_name_or_path=tmp_path / "sft",
        reward_model=tmp_path / "reward_model",
        train_dataset=data / "prompts.jsonl",
        eval_dataset=data / "held_out_prompts.jsonl",
        output_dir=tmp_path / "ppo",
        steps=32,
        batch_size=16,
        mini_batch_size=8,
        eval_steps=1,
    )
    capsys.readouterr()
    example.show(tmp_path, seed=0, started=0.0)
    last = capsys.readouterr().out.splitlines()[-1]
    number = r"-?\d+\.\d\d"
    each = rf"\w+ before={number} after={number} "
    assert re.fullmatch(
        rf"(?:{each}){{3}}kl={number} reward_accuracy={number} seed=0 seconds=\d+",
        last,
    )
    [first, *_] = RunDirectory(tmp_path / "ppo").read_episodes(split="train")
    totals = first.reward_totals
    assert first.reward == totals["reward_model"].value
    assert {name: total.weight for name, total in totals.items()} == {
        "reward_model": 1.0,
        "sentiment": 0.0,
        "grammatical": 0.0,
    }


def test_it_runs_from_anywhere(example, tmp_path, monkeypatch):
    """Its settings name code by paths that start at the repository."""
    commands = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "SIZES", dict.fromkeys(example.SIZES, 1))
    monkeypatch.setattr(
        example, "run_command", lambda command, **options: commands.update({command: options})
    )
    monkeypatch.setattr(example, "show", lambda *arguments: None)
    monkeypatch.setattr("sys.argv", ["reviews.py"])
    example.main()
    assert list(commands) == ["sft", "reward", "ppo"]
    watching = [load_object(reference) for reference in commands["ppo"]["reward"]]
    assert [each.name for each in watching] == ["sentiment", "grammatical"]
