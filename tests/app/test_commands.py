"""`etude sft` and `etude ppo`, whole runs on a tiny model: what the options say is what happens."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from etude.app.cli import main
from etude.models.adapters import current_peft
from etude.models.loading import load_tokenizer
from etude.runtime.run import RunDirectory
from etude.trainers.sft import SFTTrainer

REWARDS = """
def share_of_digits(prompts, completions, goal, **columns):
    assert len(goal) == len(completions)
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory, make_llama: Any, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_directory: Path) -> Path:
    """A current directory with a user's code, data and configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    for split, count in {"train": 6, "validation": 3, "test": 3}.items():
        tasks = [{"prompt": f"{n}+{n}=", "goal": n} for n in range(count)]
        write_lines(tmp_path / f"{split}.jsonl", tasks)
    settings = {
        "model_name_or_path": str(model_directory),
        "train_dataset": "train.jsonl",
        "eval_dataset": "validation.jsonl",
        "test_dataset": "test.jsonl",
        "tools": ["calculator"],
        "reward": "rewards.py:share_of_digits",
        "generation": {"max_new_tokens": 32, "temperature": 1.0},
        "output_dir": "runs/ppo",
        "disable_progress": True,
        "steps": 8,
        "batch_size": 4,
        "mini_batch_size": 2,
        "ppo_epochs": 1,
        "eval_steps": 1,
        "success_reward": 0.2,
        "load_best_model_at_end": False,
    }
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_ppo_trains_as_the_file_and_the_command_line_say(
    workplace: Path, model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "ppo.yaml", "--generation.max_new_tokens", "8", "--learning_rate", "1e-3"]
    assert main(["ppo", *arguments]) == 0

    run = RunDirectory("runs/ppo")
    assert run.read_config()["learning_rate"] == 1e-3
    played = run.read_episodes(split="train")
    assert len(played) == 8
    assert all(sum(episode.sampled) <= 4 * 8 for episode in played)  # four turns of eight tokens
    assert len({episode.completion for episode in played}) > 4
    for episode in played:
        digits = sum(character.isdigit() for character in episode.completion)
        assert episode.reward == pytest.approx(digits / max(len(episode.completion), 1))
    assert len(run.read_episodes(split="before")) == len(run.read_episodes(split="after")) == 3
    out = capsys.readouterr().out
    assert f"success on held-out tasks: {run.read_summary()['before']:.1%} before" in out
    assert "report: " in out
    before, after = weights(model_directory), weights(workplace / "runs/ppo")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_rewards_with_arguments(workplace: Path) -> None:
    rewards = ["rewards.py:share_of_digits", "etude:OverlongPenalty(9, cache_length=4, weight=0.5)"]
    rewards += ["etude:ToolErrorPenalty(weight=0.25)"]
    short = ["--generation.max_new_tokens=8", "--steps=4", "--eval_steps=0"]
    assert main(["ppo", "--config=ppo.yaml", *short, "--reward", *rewards]) == 0
    run = RunDirectory("runs/ppo")
    names = {"share_of_digits", "overlong", "tool_errors"}
    assert {f"rewards/{name}" for name in names} <= run.read_metrics()[0].keys()
    for episode in run.read_episodes(split="train"):
        totals = episode.reward_totals
        assert totals.keys() == names
        excess = max(sum(episode.sampled) - 5, 0)
        assert totals["overlong"].value == -min(excess / 4, 1.0)
        assert (totals["overlong"].weight, totals["tool_errors"].weight) == (0.5, 0.25)


def test_ppo_goes_on_from_where_it_was(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["ppo", "--config=ppo.yaml", "--generation.max_new_tokens=8", "--eval_steps=0", "--save_steps=1"]
    assert main([*short, "--output_dir=runs/whole"]) == 0
    assert main([*short, "--output_dir=runs/halves", "--steps=4"]) == 0
    assert main([*short, "--output_dir=runs/halves"]) == 2  # it is in the way, and says so
    assert "resume_from_checkpoint" in capsys.readouterr().err
    assert main([*short, "--output_dir=runs/halves", "--resume_from_checkpoint"]) == 0
    whole, halves = weights(workplace / "runs/whole"), weights(workplace / "runs/halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert len(RunDirectory("runs/halves").read_metrics()) == 2


def test_ppo_trains_a_value_model_beside_the_policy(workplace: Path, make_gpt2: Any) -> None:
    make_gpt2(7).save_pretrained(workplace / "critic")
    options = ["--generation.max_new_tokens=8", "--steps=4", "--init_kl_coef=0", "--adap_kl_ctrl=false"]
    value = ["--value_model=critic", "--value_learning_rate=1e-2"]
    assert main(["ppo", "--config=ppo.yaml", *options, *value]) == 0
    before, after = weights(workplace / "critic"), weights(workplace / "runs/ppo/value_model")
    moved = [name for name in after if not torch.equal(before[f"transformer.{name}"], after[name])]
    assert moved
    assert (workplace / "runs/ppo/value_model/value_head.safetensors").exists()
    assert not (workplace / "runs/ppo/value_head.safetensors").exists()
    run = RunDirectory("runs/ppo")
    assert run.read_config()["value_model"] == "critic"
    [row] = [row for row in run.read_metrics() if "reward" in row]
    assert row["objective/kl"] is None, "no reference, no KL"


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_the_reward_is_an_adapter_on_the_same_base(
    workplace: Path, model_directory: Path, command: str
) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model_directory, num_labels=1, pad_token_id=0
    )
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    with current_peft():
        reward_model = get_peft_model(classifier, config).eval()
    reward_model.save_pretrained(workplace / "judge")
    settings = yaml.safe_load((workplace / "ppo.yaml").read_text())
    del settings["reward"]
    settings |= {
        "reward_adapter": "judge",
        "use_peft": True,
        "output_dir": f"runs/{command}",
        "eval_steps": 0,
    }
    if command == "grpo":
        for name in ("batch_size", "mini_batch_size", "ppo_epochs", "steps"):
            del settings[name]
        settings |= {"per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 2, "save_steps": 1}
    (workplace / "judged.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main([command, "--config=judged.yaml", "--generation.max_new_tokens=8"]) == 0
    played = RunDirectory(f"runs/{command}").read_episodes(split="train")
    assert played
    for episode in played:
        with torch.no_grad():
            score = reward_model(input_ids=torch.tensor([episode.token_ids])).logits.item()
        assert episode.reward == pytest.approx(score, abs=1e-4)
    names = {path.name for path in (workplace / "runs" / command).rglob("*") if path.is_dir()}
    assert not any("reward" in name for name in names), "the policy is saved without its judge"


def test_ppo_trains_an_adapter(workplace: Path) -> None:
    adapter = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    assert main(["ppo", "--config=ppo.yaml", "--generation.max_new_tokens=8", "--steps=4", *adapter]) == 0
    saved = json.loads((workplace / "runs/ppo/adapter_config.json").read_text())
    assert (saved["r"], sorted(saved["target_modules"])) == (2, ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tools", "calculater"], "did you mean calculator?"),
        (["--reward", "rewards.py:share"], "there is no 'share' in rewards.py"),
        (["--train_dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model_name_or_path", "./nowhere"], "there is no directory './nowhere'"),
        (["--generation.max_new_token", "3"], "did you mean 'max_new_tokens'?"),
        (["--resume_from_checkpoint"], "holds no checkpoint to resume from"),
    ],
)
def test_ppo_says_in_one_line_what_is_wrong(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["ppo", "--config=ppo.yaml", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # what stands before it is transformers' progress
    assert error.startswith("etude: error: ")
    assert message in error


def test_ctrl_c_ends_with_130(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "interrupting.py").write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    assert main(["ppo", "--config=ppo.yaml", "--tools=interrupting.py:f"]) == 130
    assert capsys.readouterr().err == "etude: interrupted\n"


# ---- sft ----


def sft(model_directory: Path, *arguments: str) -> int:
    common = [
        "--train_dataset=demonstrations.jsonl",
        "--output_dir=runs/sft",
        "--save_strategy=no",
        "--use_cpu",
    ]
    small = ["--per_device_train_batch_size=4", "--max_steps=6", "--learning_rate=1e-2", "--disable_tqdm"]
    return main(["sft", f"--model_name_or_path={model_directory}", *common, *small, *arguments])


@pytest.fixture
def demonstrations(workplace: Path) -> Path:
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(8)]
    write_lines(workplace / "demonstrations.jsonl", rows)
    return workplace


def test_sft_learns_its_demonstrations(
    demonstrations: Path, model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft(model_directory, "--logging_steps=1", "--save_strategy=steps", "--save_steps=3") == 0
    assert "model: runs/sft\nreport: " in capsys.readouterr().out
    state = json.loads((demonstrations / "runs/sft/checkpoint-6/trainer_state.json").read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    assert losses[-1] < losses[0]
    assert load_tokenizer("runs/sft").eos_token == "[eos]"

    trained = weights(demonstrations / "runs/sft")
    assert sft(model_directory, "--resume_from_checkpoint=runs/sft/checkpoint-3") == 0
    again = weights(demonstrations / "runs/sft")
    assert all(torch.allclose(trained[name], again[name], atol=1e-6) for name in trained)


def test_ctrl_c_says_where_to_go_on_from(
    demonstrations: Path, model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    losses = SFTTrainer.losses

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "losses", interrupted)
        assert sft(model_directory) == 130
    said = "checkpoint: runs/sft/checkpoint-1, which --resume_from_checkpoint goes on from"
    assert said in capsys.readouterr().out
    assert sft(model_directory, "--resume_from_checkpoint") == 0


def test_sft_trains_an_adapter_and_evaluates(demonstrations: Path, model_directory: Path) -> None:
    options = ["--use_peft", "--lora_r=2", "--eval_dataset=demonstrations.jsonl", "--eval_strategy=epoch"]
    assert sft(model_directory, *options) == 0
    assert json.loads((demonstrations / "runs/sft/adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval_dataset=demonstrations.jsonl"], "eval_dataset does nothing while eval_strategy is no"),
        (["--resume_from_checkpoint"], "runs/sft holds no checkpoint"),
        (["--resume_from_checkpoint=runs/other"], "runs/other is no checkpoint"),
        (["--max_length=1"], "max_length is 1"),
        (["--train_dataset=demonstration.jsonl"], "demonstration.jsonl"),
    ],
)
def test_sft_says_in_one_line_what_is_wrong(
    demonstrations: Path,
    model_directory: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert sft(model_directory, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
