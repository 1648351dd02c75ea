"""The calculator example: its data, its reward, and the whole way in a few steps."""

import importlib.util
import random
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from etude.app.cli import main as etude
from etude.data.files import load_rows
from etude.runtime.run import RunDirectory
from etude.tools.calculator import calculator

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("calculator_example", ROOT / "examples" / "calculator.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tasks_are_right_and_held_out(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "SIZES", {"train": 300, "validation": 50, "test": 50})
    monkeypatch.setattr(example, "DEMONSTRATIONS", 100)
    example.write_data(tmp_path, seed=3)
    seen = []
    for split in example.SIZES:
        for row in load_rows(tmp_path / f"{split}.jsonl"):
            expression = re.fullmatch(r"What is (.*)\?", row["prompt"])[1]
            assert calculator(expression) == str(row["answer"])
            seen.append(expression)
    for row in load_rows(tmp_path / "demonstrations.jsonl"):
        seen.append(re.fullmatch(r"What is (.*)\?", row["segments"][0]["text"])[1])
    assert len(seen) == len(set(seen)) == 500, "no task of one split is in another"


def test_demonstrations_are_mostly_bad(example):
    rng = random.Random(0)
    source = example.tasks(rng)
    shown = right = 0
    for _ in range(2000):
        expression, value = next(source)
        said = example.demonstration(rng, expression)
        shown += any(segment["source"] == "tool" for segment in said)
        right += said[-1]["text"] == f"Result={value}<submit>"
    assert 0.22 < shown / 2000 < 0.28
    assert 0.18 < right / 2000 < 0.27


def test_the_reward(example):
    completions = [
        "Result=12<submit>",
        "Result=-3<submit>",
        "Result=12",
        "Result=12<submit> or Result=3<submit>",
    ]
    assert example.exact_answer(completions, answer=[12, -3, 12, 12]) == [1.0, 1.0, 0.0, 0.0]


def test_the_tokenizer_spells_everything_in_one_way(example, tmp_path):
    example.write_model(tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "What is 10*2+3?<request><calculator>10*2+3<call>23<response>Result=23<submit>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["What is ", "1", "0"]


def test_the_whole_way(example, tmp_path, monkeypatch, capsys):
    """What `make demo` does, with a few steps of each kind: it is the two commands and their files."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(example, "SIZES", {"train": 64, "validation": 8, "test": 8})
    monkeypatch.setattr(example, "DEMONSTRATIONS", 64)
    example.write_data(tmp_path / "data", seed=0)
    example.write_model(tmp_path / "model", seed=0)
    arguments = [
        f"--config=examples/calculator_sft.yaml --model_name_or_path={tmp_path}/model --max_steps=3",
        f"--train_dataset={tmp_path}/data/demonstrations.jsonl --output_dir={tmp_path}/sft",
    ]
    assert etude(["sft", *" ".join(arguments).split()]) == 0
    arguments = [
        f"--config=examples/calculator.yaml --model_name_or_path={tmp_path}/sft --output_dir={tmp_path}",
        f"--train_dataset={tmp_path}/data/train.jsonl --eval_dataset={tmp_path}/data/validation.jsonl",
        f"--test_dataset={tmp_path}/data/test.jsonl --steps=32 --batch_size=16 --mini_batch_size=8",
    ]
    assert etude(["ppo", *" ".join(arguments).split()]) == 0
    capsys.readouterr()
    example.show(tmp_path, seed=0, started=0.0)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"success before=\d\.\d\d after=\d\.\d\d seed=0 seconds=\d+", last)
    run = RunDirectory(tmp_path)
    assert run.read_config()["tools"] == ["calculator"]
    assert len(run.read_episodes(split="after")) == 8
    # The settings that are stored can be given back as they are.
    again = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "again.yaml").write_text(
        yaml.safe_dump({**again, "output_dir": f"{tmp_path}/again", "steps": 16})
    )
    assert etude(["ppo", "--config", f"{tmp_path}/again.yaml"]) == 0
