"""`etude sample`, and the loop that it closes: what a model sampled is what it learns from next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from etude.app.cli import main
from etude.data.files import load_rows
from etude.runtime.run import RunDirectory

REWARDS = """
def share_of_digits(completions, goal):
    assert len(goal) == len(completions)
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_llama: Any, tokenizer: Any) -> Any:
    """Runs the command in a current directory with a model, tasks and a reward."""
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    tasks = [{"prompt": f"{n}+{n}=", "goal": n} for n in range(6)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))

    def run(*arguments: str) -> int:
        given = ["--model_name_or_path=model", "--dataset=tasks.jsonl", "--output_dir=runs/samples"]
        given += ["--reward=rewards.py:share_of_digits", "--generation.max_new_tokens=8", "--seed=1"]
        return main(["sample", *given, *arguments])

    return run


def test_what_was_sampled_is_learnt(sample: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--tools=calculator", "--num_samples=3", "--slots=4") == 0
    out = capsys.readouterr().out
    assert "18 episodes of 6 tasks: mean reward 0." in out
    assert "the best of 3 is at most 0.432 nats from the model" in out
    assert "6 rows: runs/samples/segments.jsonl" in out
    assert Path("runs/samples/report.html").exists()
    played = RunDirectory("runs/samples").read_groups()
    rewards = [max(episode.reward for episode in played[task]) for task in range(6)]
    assert [row["reward"] for row in load_rows("runs/samples/segments.jsonl")] == rewards

    arguments = "--model_name_or_path=model --train_dataset=runs/samples/segments.jsonl --output_dir=runs/sft"
    arguments += " --max_steps=8 --learning_rate=1e-2 --logging_steps=1 --append_eos=false --save_steps=8"
    assert main(["sft", *arguments.split()]) == 0
    state = json.loads(Path("runs/sft/checkpoint-8/trainer_state.json").read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    assert losses[-1] < losses[0]


def test_it_goes_on_and_chooses_anew(sample: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--num_samples=2") == 0
    episodes = Path("runs/samples/episodes.jsonl").read_bytes()
    assert sample("--num_samples=2", "--format=preference") == 2
    assert "go on with them by resume" in capsys.readouterr().err
    assert sample("--num_samples=2", "--format=preference", "--resume") == 0
    assert Path("runs/samples/episodes.jsonl").read_bytes() == episodes
    rows = load_rows("runs/samples/preference.jsonl")
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert min(rows["margin"]) > 0
    assert sample("--num_samples=2", "--generation.temperature=0.5", "--resume") == 2
    assert "were played with generation" in capsys.readouterr().err


def test_what_chooses_nothing_says_so(sample: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--num_samples=1", "--min_reward=2") == 0
    out = capsys.readouterr().out
    assert "0 rows: runs/samples/segments.jsonl\nnothing is good enough to be a row" in out
    assert "nats" not in out, "of one there is no best"
    assert sample("--num_samples=1", "--min_reward=-1", "--resume") == 0
    assert "6 rows: " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["dpo", "reward", "kto"])
def test_what_was_better_is_learnt(sample: Any, command: str) -> None:
    rated = ["--format=unpaired-preference", "--min_reward=0.2"]
    chosen = rated if command == "kto" else ["--format=preference"]
    assert sample("--num_samples=3", *chosen) == 0
    file = "unpaired-preference" if command == "kto" else "preference"
    arguments = f"--model_name_or_path=model --train_dataset=runs/samples/{file}.jsonl --max_steps=2"
    assert main([command, *arguments.split(), "--output_dir=runs/learnt", "--save_strategy=no"]) == 0
    assert Path("runs/learnt/model.safetensors").exists()


def test_the_stored_settings_can_be_given_back(sample: Any) -> None:
    assert sample() == 0
    assert main(["sample", "--config=runs/samples/run.yaml", "--output_dir=runs/again"]) == 0
    first, again = (Path("runs", name, "segments.jsonl").read_text() for name in ("samples", "again"))
    assert first == again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format=preference", "--num_samples=1"], "a preference is between two episodes"),
        (["--keep=0"], "keep is 0"),
        (["--slots=0"], "slots is 0"),
        (["--dataset=task.jsonl"], "did you mean 'tasks.jsonl'?"),
        (["--use_peft"], "unknown option --use_peft"),
    ],
)
def test_it_says_in_one_line_what_is_wrong(
    sample: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert sample(*arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()


def test_one_process_only(
    sample: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sample() == 2
    assert "runs in one process" in capsys.readouterr().err
