"""`etude ppo`, `grpo`, `rloo`, `eval` and `sample` on an encoder–decoder: the checkpoint says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from encoder_decoders import START, make_seq2seq, seq2seq_tokenizer
from safetensors.torch import load_file

from etude import AutoModelForSeq2SeqLMWithValueHead
from etude.app.cli import main
from etude.runtime.run import RunDirectory

REWARD = "def letters(completions):\n    return [sum('a' <= c <= 'm' for c in t) / 8 for t in completions]\n"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    monkeypatch.chdir(tmp_path)
    make_seq2seq("t5").save_pretrained("model")
    seq2seq_tokenizer().save_pretrained("model")
    rows = [{"prompt": f"number {n}"} for n in range(4)]
    Path("tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("reward.py").write_text(REWARD, encoding="utf-8")
    return ["--reward=reward.py:letters", "--generation.max_new_tokens=6", "--max_turns=1"]


TRAIN = ["--model_name_or_path=model", "--train_dataset=tasks.jsonl", "--output_dir=run"]
TRAIN += ["--disable_progress=true", "--learning_rate=1e-2"]
BATCHES = {
    "ppo": ["--batch_size=4", "--mini_batch_size=4", "--steps=8", "--ppo_epochs=1", "--eval_steps=0"],
    "grpo": ["--num_generations=4", "--per_device_train_batch_size=4", "--max_steps=2", "--beta=0.05"],
    "rloo": ["--num_generations=4", "--per_device_train_batch_size=4", "--max_steps=2"],
}


@pytest.mark.parametrize("adapter", [[], ["--use_peft=true", "--lora_r=2"]], ids=["whole", "adapter"])
@pytest.mark.parametrize("command", BATCHES)
def test_training(command: str, adapter: list[str], options: list[str]) -> None:
    assert main([command, *TRAIN, *options, *BATCHES[command], *adapter]) == 0
    run = RunDirectory("run")
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
    assert all(row["sampler/gap_max"] < 2e-4 for row in run.read_metrics())
    for episode in run.read_episodes(split="train"):
        assert [segment.encoder for segment in episode.segments[:2]] == [True, False]
        assert episode.segments[1].token_ids == [START]
        assert episode.prompt.startswith("number ")
    if adapter:
        assert any(
            w.any() for name, w in load_file("run/adapter_model.safetensors").items() if "lora_B" in name
        )
    else:
        before, after = load_file("model/model.safetensors"), load_file("run/model.safetensors")
        assert any(not torch.equal(before[name], after[name]) for name in before)
    if command == "ppo":
        model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained("run")
        assert model.is_peft_model == bool(adapter)


def test_evaluation_and_samples(options: list[str]) -> None:
    place = ["--model_name_or_path=model", "--test_dataset=tasks.jsonl", "--output_dir=evaluation"]
    assert main(["eval", *place, *options]) == 0
    assert len(RunDirectory("evaluation").read_episodes()) >= 4
    sampling = [
        "--model_name_or_path=model",
        "--dataset=tasks.jsonl",
        "--output_dir=samples",
        "--num_samples=3",
    ]
    assert main(["sample", *sampling, *options]) == 0
    played = RunDirectory("samples").read_groups()
    assert sorted(len(group) for group in played.values()) == [3] * 4
    assert len({episode.completion for group in played.values() for episode in group}) > 6


def test_a_value_model_of_its_own_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", *TRAIN, *options, *BATCHES["ppo"], "--value_model=model"]) == 2
    assert "is an encoder-decoder model" in capsys.readouterr().err


def test_the_best_samples_are_learnt(options: list[str]) -> None:
    """What a decoder begins with is no text of the episode's, for which an answer would have no place."""
    sampling = [
        "--model_name_or_path=model",
        "--dataset=tasks.jsonl",
        "--output_dir=samples",
        "--num_samples=3",
    ]
    assert main(["sample", *sampling, *options, "--format=prompt-completion"]) == 0
    learning = ["--model_name_or_path=model", "--train_dataset=samples/prompt-completion.jsonl"]
    learning += ["--output_dir=sft", "--max_steps=2", "--save_steps=2", "--learning_rate=1e-2"]
    assert main(["sft", *learning]) == 0
    before, after = load_file("model/model.safetensors"), load_file("sft/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
