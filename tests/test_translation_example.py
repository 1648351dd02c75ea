"""The translation example: its pairs, its model, and the whole way in a few steps."""

import importlib.util
import random
import re
from datetime import date
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from etude import TranslationEnvironment
from etude.app.cli import main as etude
from etude.data.files import load_rows
from etude.runtime.run import RunDirectory

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("translation_example", ROOT / "examples" / "translation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIZES", {"train": 60, "validation": 8, "test": 10})
    monkeypatch.setattr(module, "REFERENCES", 300)
    return module


@pytest.fixture
def place(example, tmp_path):
    example.write_data(tmp_path / "data", seed=0)
    example.write_model(tmp_path / "model", tmp_path / "data", seed=0)
    return tmp_path


def test_what_there_is_to_say_in_words_and_in_figures(example):
    day, price = date(2021, 3, 12), example.Price(1202, "EUR")
    assert example.in_words(day, "German") == "Freitag, 12. März 2021"
    assert example.in_words(day, "French") == "vendredi 12 mars 2021"
    assert example.in_words(7082, "Spanish") == "siete mil ochenta y dos"
    assert example.in_words(price, "Italian") == "dodici euro e due centesimi"
    assert [example.in_figures(each) for each in (day, 7082, price)] == ["2021-03-12", "7082", "€12.02"]


def test_each_content_comes_once(example):
    source = example.contents(random.Random(0))
    drawn = [next(source) for _ in range(3000)]
    said = [content.cents if isinstance(content, example.Price) else content for content in drawn]
    kinds = [type(content).__name__ for content in drawn]
    assert len(set(zip(kinds, said, strict=True))) == 3000
    assert all(900 < kinds.count(kind) < 1100 for kind in ("int", "date", "Price"))


@pytest.mark.parametrize(
    ("text", "slipped"),
    [("7082", "7028"), ("2021-03-12", "2021-03-21"), ("€12.02", "€12.20"), ("4. März 2021", "4. März 2012")],
)
def test_a_slip_swaps_the_last_two_digits(example, text, slipped):
    assert example.slip(text) == slipped


def test_most_references_are_wrong(example):
    rng, contents = random.Random(0), example.contents(random.Random(1))
    right = 0
    for content in (next(contents) for _ in range(2000)):
        made = example.reference(rng, content)
        source = made["prompt"].split(": ", 1)[1]
        spoken, meant = re.match(r"translate (\w+) to (\w+):", made["prompt"]).groups()
        assert source == example.in_words(content, spoken)
        truth = example.in_figures(content) if meant == "figures" else example.in_words(content, meant)
        right += truth == made["completion"]
    assert 0.37 < right / 2000 < 0.43


def test_references_begin_as_the_environment_does(example, place):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    environment = TranslationEnvironment(None, tokenizer)
    for row in load_rows(place / "data/train.jsonl"):
        assert environment.build_prompt(row) == example.prompt(row)


def test_the_tokenizer_ends_texts_and_spells_everything(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(place / "model")
    assert model.config.decoder_start_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    for text in ("translate German to figures: zwölf Euro, 12. März 2021", "£1,234.50", "日本"):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id == model.config.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text


def test_the_whole_way(example, place, monkeypatch, capsys):
    """What the script does, with a few steps of each kind: it is the two commands and their files."""
    monkeypatch.chdir(ROOT)
    arguments = [
        f"--config=examples/translation_sft.yaml --model_name_or_path={place}/model --max_steps=2",
        f"--train_dataset={place}/data/references.jsonl --output_dir={place}/sft",
    ]
    assert etude(["sft", *" ".join(arguments).split()]) == 0
    arguments = [
        f"--config=examples/translation.yaml --model_name_or_path={place}/sft --output_dir={place}",
        f"--train_dataset={place}/data/train.jsonl --eval_dataset={place}/data/validation.jsonl",
        f"--test_dataset={place}/data/test.jsonl --steps=24 --batch_size=12 --mini_batch_size=6",
        "--eval_steps=1",
    ]
    assert etude(["ppo", *" ".join(arguments).split()]) == 0
    capsys.readouterr()
    example.show(place, seed=0, started=0.0)
    last = capsys.readouterr().out.splitlines()[-1]
    number = r"\d+\.\d+"
    each = f"before={number} after={number}"
    assert re.fullmatch(rf"chrf {each} right {each} seed=0 seconds=\d+", last)
    run = RunDirectory(place)
    assert run.read_config()["environment"] == "translation"
    assert len(run.read_episodes(split="after")) == 10
