"""`etude reward` and `etude prm`, whole runs on a tiny model, and what they leave as another run's reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from etude.app.cli import main
from etude.models.reward_model import kind_in, load_reward_model
from etude.rewards.model import ModelReward
from etude.rewards.process import ProcessReward
from etude.runtime.loop import run_sync
from etude.runtime.run import RunDirectory

PAIRS = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no"} for n in range(6)]
STEPS = [{"prompt": f"{n}+{n}=", "completions": [str(n), "so"], "labels": [True, n > 2]} for n in range(6)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_llama: Any, tokenizer: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, rows in (
        ("reward", PAIRS),
        ("prm", STEPS),
        ("tasks", [{"prompt": f"say {n}:"} for n in range(4)]),
    ):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def train(command: str, **options: Any) -> int:
    settings = {
        "model_name_or_path": "model",
        "train_dataset": f"{command}.jsonl",
        "eval_dataset": f"{command}.jsonl",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "output_dir": f"runs/{command}",
        "learning_rate": 1e-3,
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        **options,
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    return main([command, "--config", "run.yaml"])


@pytest.mark.parametrize("adapter", [{}, {"use_peft": True, "lora_r": 2}], ids=["whole", "adapter"])
@pytest.mark.parametrize(
    ("command", "settings"),
    [("reward", {"center_rewards_coefficient": 0.01}), ("prm", {"step_separator": "."})],
)
def test_what_is_trained_is_a_reward_of_the_next_run(
    workplace: Path, command: str, settings: dict[str, Any], adapter: dict[str, Any]
) -> None:
    assert train(command, **settings, **adapter) == 0
    kind = "sequence" if command == "reward" else "token"
    assert kind_in(f"runs/{command}") == kind
    assert Path(f"runs/{command}/adapter_config.json").exists() == bool(adapter)
    state = json.loads(Path(f"runs/{command}/checkpoint-2/trainer_state.json").read_text())
    evaluated = [row for row in state["log_history"] if "eval_accuracy" in row]
    assert len(evaluated) == 2
    assert evaluated[0]["eval_loss"] != evaluated[1]["eval_loss"]

    options = {
        "model_name_or_path": "model", "train_dataset": "tasks.jsonl", "reward_model": f"runs/{command}",
        "output_dir": "runs/policy", "max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2,
        "max_turns": 1, "generation": {"max_new_tokens": 8}, "disable_progress": True,
    }  # fmt: skip
    Path("policy.yaml").write_text(yaml.safe_dump(options))
    assert main(["grpo", "--config", "policy.yaml"]) == 0
    played = RunDirectory("runs/policy").read_episodes(split="train")
    assert played
    reward = (ModelReward if command == "reward" else ProcessReward)(f"runs/{command}")
    scores = run_sync(reward(played))
    for episode, score in zip(played, scores, strict=True):
        assert {each.name for each in episode.rewards} == {command}
        expected = score if isinstance(score, float) else sum(s for s in score if s is not None)
        assert episode.reward == pytest.approx(expected, abs=1e-4)


def test_a_critic_starts_from_it_and_a_run_goes_on(workplace: Path) -> None:
    assert train("reward", max_steps=4) == 0
    unbroken = load_reward_model("runs/reward").state_dict()
    assert train("reward", max_steps=4, resume_from_checkpoint="runs/reward/checkpoint-2") == 0
    for name, weight in load_reward_model("runs/reward").state_dict().items():
        assert torch.equal(weight, unbroken[name])
    options = ["--steps=2", "--batch_size=2", "--mini_batch_size=2", "--max_turns=1", "--disable_progress"]
    value = ["--value_model=runs/reward", "--reward=etude:ModelReward('runs/reward', weight=0.5)"]
    arguments = [
        "--model_name_or_path=model",
        "--train_dataset=tasks.jsonl",
        "--output_dir=runs/ppo",
        *options,
    ]
    assert main(["ppo", *arguments, "--generation.max_new_tokens=8", *value]) == 0
    [reward] = RunDirectory("runs/ppo").read_episodes(split="train")[0].rewards
    assert (reward.name, reward.weight) == ("reward_model", 0.5)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (
            "reward",
            {"train_dataset": "prm.jsonl"},
            "expected one of these combinations: [prompt +] chosen + rejec",
        ),
        ("prm", {"train_dataset": "reward.jsonl"}, "prompt + completions + labels"),
        ("reward", {"center_rewards_coefficient": -1}, "center_rewards_coefficient is -1"),
        ("reward", {"model_name_or_path": "./nowhere"}, "there is no directory './nowhere'"),
        ("prm", {"append_eos": True}, "unknown option append_eos"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], command: str, options: dict[str, Any], message: str
) -> None:
    assert train(command, **options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("etude: error: ")
    assert message in error


def test_a_policy_is_no_reward_model(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model_name_or_path=model", "--train_dataset=tasks.jsonl", "--output_dir=runs/p"]
    assert main(["grpo", *arguments, "--reward_model=model"]) == 2
    assert "of another kind, LlamaForCausalLM; expected one that scores" in capsys.readouterr().err
