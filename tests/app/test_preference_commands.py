"""`etude dpo`, `kto`, `orpo`, `simpo` and `cpo`, whole runs on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file

from etude.app.cli import main

PAIRS = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no"} for n in range(6)]
RATED = [{"prompt": f"{n}+{n}=", "completion": str(2 * n + n % 2), "label": n % 2 == 0} for n in range(6)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_llama: Any, tokenizer: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, rows in (("pairs", PAIRS), ("rated", RATED)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": "model",
        "train_dataset": "pairs.jsonl",
        "eval_dataset": "pairs.jsonl",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "output_dir": "run",
        "learning_rate": 1e-3,
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def state() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("run/checkpoint-2/trainer_state.json").read_text())
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["dpo", "--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.5"],
        ["dpo", "--precompute_ref_log_probs", "--beta", "0.2"],
        ["kto"],
        ["kto", "--train_dataset", "rated.jsonl", "--eval_dataset", "rated.jsonl"],
        ["orpo"],
        ["simpo", "--simpo_gamma", "0.5"],
        ["cpo", "--loss_type", "alphapo", "--alpha", "0.25"],
    ],
    ids=" ".join,
)
def test_what_it_leaves_behind(
    arguments: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments
    assert main([command, "--config", "run.yaml", *options]) == 0
    assert "model: run\n" in capsys.readouterr().out
    before, after = load_file("model/model.safetensors"), load_file("run/model.safetensors")
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    evaluated = next(entry for entry in state()["log_history"] if "eval_loss" in entry)
    assert "eval_rewards/margins" in evaluated
    assert f"- {command}\n" in Path("run/README.md").read_text()


def test_an_adapter_and_a_resumed_run(workplace: Path) -> None:
    """The reference is the model without its adapter, in the resumed run, too."""
    command = ["dpo", "--config", "run.yaml", "--use_peft", "--lora_r", "2"]
    assert main(command) == 0
    unbroken, logged = load_file("run/adapter_model.safetensors"), state()["log_history"]
    assert main([*command, "--resume_from_checkpoint", "run/checkpoint-1"]) == 0
    again = load_file("run/adapter_model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in unbroken.items())
    margins = [entry["rewards/margins"] for entry in logged if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-6)
    assert len(margins) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpo", "--loss_type", "dpo"], "loss_type is 'dpo'; expected one or several of sigmoid, hinge"),
        (["dpo", "--rpo_alpha", "1.0"], "unknown option --rpo_alpha"),
        (["simpo", "--beta", "0"], "beta is 0.0; expected a number > 0"),
        (["kto", "--loss_type", "bco"], "loss_type"),
        (["orpo", "--train_dataset", "rated.jsonl"], "expected one of these combinations: [prompt +] chosen"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments
    assert main([command, "--config", "run.yaml", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("etude: error: ")
    assert message in said
