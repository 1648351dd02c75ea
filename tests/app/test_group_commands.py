"""`etude grpo`, `etude rloo` and their relatives, whole runs on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from etude.app.cli import main
from etude.runtime.run import RunDirectory


@pytest.mark.parametrize("command", ["grpo", "rloo", "reinforce", "reinforce_plus_plus", "iterative_sft"])
def test_a_group_algorithm_from_the_command_line(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_llama: Any,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [{"prompt": f"{n}+{n}="} for n in range(3)]
    Path("tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward = "def digits(completions):\n    return [sum(c.isdigit() for c in t) / 8 for t in completions]\n"
    Path("reward.py").write_text(reward, encoding="utf-8")
    options = {
        "model_name_or_path": "model",
        "train_dataset": "tasks.jsonl",
        "test_dataset": "tasks.jsonl",
        "reward": "reward.py:digits",
        "generation.max_new_tokens": 8,
        "max_turns": 1,
        "output_dir": "run",
        "disable_progress": "true",
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        **({"beta": 0.05} if command != "iterative_sft" else {}),
        **({"scale_rewards": "none", "loss_type": "grpo"} if command == "grpo" else {}),
    }
    assert main([command, *(f"--{name}={value}" for name, value in options.items())]) == 0
    run = RunDirectory("run")
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3]
    assert run.read_config()["num_generations"] == 4
    assert "success on held-out tasks" in capsys.readouterr().out
    before, after = load_file("model/model.safetensors"), load_file("run/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert f"{command}" in Path("run/README.md").read_text(encoding="utf-8")

    assert (
        main([command, *(f"--{name}={value}" for name, value in options.items()), "--num_generations=0"]) == 2
    )
    assert "num_generations is 0" in capsys.readouterr().err
