"""The example of three skills in one run: its data, and the whole way in a few steps."""

import importlib.util
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from etude.app.cli import main as etude
from etude.data.files import load_rows
from etude.environments.summarization import TEMPLATES
from etude.runtime.run import RunDirectory

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # where a script's own neighbours are
    spec = importlib.util.spec_from_file_location("mixed_example", ROOT / "examples" / "mixed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIZES", {"test": 9, "validation": 6, "train": 60})
    monkeypatch.setattr(module, "DEMONSTRATIONS", 100)
    return module


@pytest.fixture
def place(example, tmp_path):
    example.write_data(tmp_path / "data", seed=0)
    example.write_model(tmp_path / "model", tmp_path / "data", seed=0)
    return tmp_path


def test_tasks_come_once_and_demonstrations_begin_as_the_environments_do(example, place):
    settings = yaml.safe_load((ROOT / "examples/mixed.yaml").read_text())["environments"]
    given = {name: each["environment_kwargs"] for name, each in settings.items() if "environment" in each}
    templates = {name: TEMPLATES.get(each["template"], each["template"]) for name, each in given.items()}
    assert set(templates) == {"translation", "summarization"}
    seen = []
    for skill, (_, show) in example.SKILLS.items():
        rows = [row for split in example.SIZES for row in load_rows(place / f"data/{skill}/{split}.jsonl")]
        for row in rows:
            prompt = show(random.Random(0), row)[0]["text"]
            assert prompt == (templates[skill].format(**row) if skill in templates else row["prompt"])
            seen.append(prompt)
    assert len(seen) == len(set(seen)) == 3 * 75
    assert len(load_rows(place / "data/demonstrations.jsonl")) == 300


def test_the_tokenizer_spells_everything_and_digits_one_by_one(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    for row in load_rows(place / "data/demonstrations.jsonl"):
        text = "".join(segment["text"] for segment in row["segments"])
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("Result=512<submit>"))
    assert pieces[-4:] == ["5", "1", "2", "<submit>"]


def test_the_whole_way(example, place, monkeypatch, capsys):
    """What the script does, with a few steps of each kind: it is the two commands and their files."""
    monkeypatch.chdir(ROOT)
    arguments = [
        f"--config=examples/mixed_sft.yaml --model_name_or_path={place}/model --max_steps=2",
        f"--per_device_train_batch_size=8 --train_dataset={place}/data/demonstrations.jsonl",
        f"--output_dir={place}/sft",
    ]
    assert etude(["sft", *" ".join(arguments).split()]) == 0
    arguments = [
        f"--config=examples/mixed.yaml --model_name_or_path={place}/sft --output_dir={place}",
        "--steps=24 --batch_size=12 --mini_batch_size=6",
        *(f"--{name}={file}" for name, file in example.places(place).items()),
    ]
    assert etude(["ppo", *" ".join(arguments).split()]) == 0
    capsys.readouterr()
    example.show(place, seed=0, started=0.0)
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"success before=\d\.\d\d after=\d\.\d\d seed=0 seconds=\d+", out[-1])
    assert [line.partition(":")[0] for line in out[-4:-1]] == list(example.SKILLS)
    played = Counter(episode.environment for episode in RunDirectory(place).read_episodes(split="train"))
    assert set(played) == set(example.SKILLS)
