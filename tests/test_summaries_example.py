"""The summaries example: its texts, its model, and the whole way in a few steps."""

import importlib.util
import random
import re
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from etude import SummarizationEnvironment
from etude.app.cli import main as etude
from etude.data.files import load_rows
from etude.rewards.summary import corpus_rouge
from etude.runtime.run import RunDirectory

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("summaries_example", ROOT / "examples" / "summaries.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIZES", {"validation": 8, "test": 10})
    monkeypatch.setattr(module, "REFERENCES", 300)
    return module


@pytest.fixture
def place(example, tmp_path):
    example.write_data(tmp_path / "data", seed=0)
    example.write_model(tmp_path / "model", tmp_path / "data", seed=0)
    return tmp_path


def test_packages_of_one_source_are_in_one_split(example):
    splits = example.packages(random.Random(0))
    sources = {split: {row["source"] for row in rows} for split, rows in splits.items()}
    assert [len(splits[split]) for split in ("validation", "test")] == [8, 10]
    assert len(splits["train"]) > 2600
    assert sources["test"].isdisjoint(sources["train"] | sources["validation"])
    assert sources["validation"].isdisjoint(sources["train"])


def test_descriptions_are_long_and_short_and_have_words_in_common(example):
    rows = [row for each in example.packages(random.Random(0)).values() for row in each]
    for row in rows:
        long, short = example.words(row["document"]), example.words(row["summary"])
        assert 3 <= len(short) <= 12 < len(long) + 2
    leads = [" ".join(row["document"].split()[:8]) for row in rows]
    assert 20 < corpus_rouge(leads, [row["summary"] for row in rows])["rouge1"] < 40


def test_most_references_are_first_words(example, monkeypatch):
    rows = example.packages(random.Random(0))["train"]
    monkeypatch.setattr(example, "REFERENCES", 2000)
    texts = {" ".join(example.words(row["document"])): row for row in rows}
    shuffled = copied = summed_up = 0
    for made in example.references(random.Random(0), rows):
        text = made["prompt"].removeprefix("summarize: ")
        if text not in texts:
            shuffled += 1
            assert text.startswith(made["completion"] + " ")
        elif made["completion"] == " ".join(example.words(texts[text]["summary"])):
            summed_up += 1
        else:
            copied += 1
            assert text.startswith(made["completion"] + " ")
    assert 0.46 < shuffled / 2000 < 0.54
    assert 0.56 < copied / (copied + summed_up) < 0.64


def test_the_environment_asks_as_references_do(example, place):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    environment = SummarizationEnvironment(None, tokenizer)
    for row in load_rows(place / "data/test.jsonl"):
        asked = tokenizer(environment.build_prompt(row))["input_ids"]
        assert asked == tokenizer("summarize: " + " ".join(example.words(row["document"])))["input_ids"]


def test_texts_begin_and_end_as_a_barts_do(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(place / "model")
    ids = tokenizer("summarize: A library for Python!")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids[1:-1]) == "summarize a library for python"
    assert model.config.decoder_start_token_id == tokenizer.eos_token_id
    assert model.generation_config.forced_bos_token_id == tokenizer.bos_token_id
    known = [
        token
        for row in load_rows(place / "data/train.jsonl")
        for token in tokenizer(row["summary"])["input_ids"]
    ]
    assert known.count(tokenizer.unk_token_id) < 0.05 * len(known)


def test_the_whole_way(example, place, monkeypatch, capsys):
    """What the script does, with a few steps of each kind: it is the two commands and their files."""
    monkeypatch.chdir(ROOT)
    arguments = [
        f"--config=examples/summaries_sft.yaml --model_name_or_path={place}/model --max_steps=2",
        f"--train_dataset={place}/data/references.jsonl --output_dir={place}/sft",
    ]
    assert etude(["sft", *" ".join(arguments).split()]) == 0
    arguments = [
        f"--config=examples/summaries.yaml --model_name_or_path={place}/sft --output_dir={place}",
        f"--train_dataset={place}/data/train.jsonl --eval_dataset={place}/data/validation.jsonl",
        f"--test_dataset={place}/data/test.jsonl --steps=24 --batch_size=12 --mini_batch_size=6",
        "--eval_steps=1",
    ]
    assert etude(["ppo", *" ".join(arguments).split()]) == 0
    capsys.readouterr()
    example.show(place, seed=0, started=0.0)
    last = capsys.readouterr().out.splitlines()[-1]
    each = r"before=\d+\.\d after=\d+\.\d"
    assert re.fullmatch(rf"rouge1 {each} rougeL {each} seed=0 seconds=\d+", last)
    [first, *_] = RunDirectory(place).read_episodes(split="train")
    assert set(first.reward_totals) == {"rouge1", "rougeL"}
    assert "<s>" not in first.completion
