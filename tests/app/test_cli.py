"""The command line as people meet it: help, mistakes, exit codes. Runs of the trainers: test_commands."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from etude import __version__
from etude.app.cli import build_arguments, main, run_command
from etude.app.options import COMMANDS, read_options
from etude.errors import ConfigError
from etude.trainers.ppo_config import PPOConfig

# Run in a process of its own: what it printed, and which of the slow libraries it loaded.
SHOW_LOADED = """
import sys
from etude.app.cli import main
code = main(sys.argv[1:])
slow = {"torch", "transformers", "datasets", "accelerate", "peft", "numpy"}
print("LOADED", *sorted(slow & set(sys.modules)))
sys.exit(code)
"""


COMPLETE = ["--model_name_or_path=m", "--train_dataset=t", "--reward=r", "--output_dir=o"]


def etude_in_a_process(*arguments: str, code: str = SHOW_LOADED) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["ppo", "--help"], ["sft", "--help"], ["sft", "--learning_rate", "1", "-h"], ["--version"]],
)
def test_help_loads_nothing_slow(arguments: list[str]) -> None:
    best = float("inf")
    for _ in range(3):  # the machine may be busy; the best of three is what the command costs
        start = time.perf_counter()
        result = etude_in_a_process(*arguments)
        best = min(best, time.perf_counter() - start)
        assert result.returncode == 0
        assert result.stdout.splitlines()[-1] == "LOADED"
    assert best < 2.0  # alone on one core: 0.1


@pytest.mark.parametrize(
    "arguments",
    [
        ["ppo", "--learning_rate", "fast"],
        ["sft", "--learnin_rate", "1"],
        [
            "ppo",
            "--model_name_or_path=m",
            "--train_dataset=t",
            "--reward=r",
            "--batch_size=3",
            "--mini_batch_size=2",
        ],
        ["ppo", "--model_name_or_path=m", "--train_dataset=t", "--reward=r", "--lora_r=4"],
    ],
)
def test_mistakes_are_found_before_anything_slow_is_loaded(arguments: list[str]) -> None:
    result = etude_in_a_process(*arguments)
    assert result.returncode == 2
    assert result.stdout == "LOADED\n"
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("etude: error: ")


def test_it_is_a_module_and_a_script() -> None:
    module = subprocess.run(
        [sys.executable, "-m", "etude", "--version"], capture_output=True, text=True, check=True
    )
    script = subprocess.run(
        [str(Path(sys.executable).with_name("etude")), "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert module.stdout == script.stdout == f"etude {__version__}\n"


def test_a_command_from_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("ppo", learnin_rate=1e-4)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == "\n$ etude ppo --learnin_rate=0.0001\n", "what one would type"
    assert "did you mean --learning_rate?" in captured.err
    with pytest.raises(SystemExit):
        run_command("ppo", reward=["a.py:b", "c.py:d"], model="e")
    assert capsys.readouterr().out == "\n$ etude ppo --reward a.py:b c.py:d --model=e\n"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_names_every_option_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    words = text.split()
    assert [name for name in read_options(command) if f"--{name}" not in words] == []
    if command != "merge":
        assert "--model_name_or_path str\n        directory or hub id of the model (required)" in text
        assert "(default: float32; one of float32, bfloat16, float16, float64, auto)" in " ".join(words)


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview
    assert all(f"  {name} " in overview for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppp"], "unknown command 'ppp'; did you mean ppo?"),
        (
            ["--config", "run.yaml"],
            f"unknown command '--config'; expected one of {', '.join(COMMANDS)}",
        ),
        (["ppo", "--learnin_rate", "1"], "unknown option --learnin_rate; did you mean --learning_rate?"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"etude: error: {message}\n")


def test_a_message_of_several_lines_becomes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: [1\n", encoding="utf-8")
    assert main(["ppo", "--config", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


WARN = """
import sys, warnings
import etude.app.cli as cli
cli._run = lambda arguments: warnings.warn("small steps\\n  are lost")
before = warnings.formatwarning
cli.main(sys.argv[1:])
assert warnings.formatwarning is before
"""


def test_a_warning_is_one_line_without_its_place() -> None:
    assert etude_in_a_process("sft", code=WARN).stderr == "etude: warning: small steps are lost\n"
    assert "UserWarning" in etude_in_a_process("sft", "--traceback", code=WARN).stderr


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError):
        main(["ppo", "--seed", "x", "--traceback"])
    monkeypatch.setenv("ETUDE_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        main(["ppo", "--seed", "x"])
    monkeypatch.setenv("ETUDE_TRACEBACK", "0")
    assert main(["ppo", "--seed", "x"]) == 2


def test_values_reach_the_class_that_declares_them() -> None:
    values = {
        "model_name_or_path": "m",
        "train_dataset": "t.jsonl",
        "reward": "r.py:f",
        "learning_rate": 1e-3,
        "resume_from_checkpoint": True,
    }
    model, tasks, episodes, start, config = build_arguments("ppo", values)
    assert model.model_name_or_path == "m"
    assert tasks.train_dataset == "t.jsonl"
    assert episodes.rewards == ["r.py:f"]
    assert start.resume_from_checkpoint is True
    assert config == PPOConfig(learning_rate=1e-3)


def test_values_that_transformers_refuses_are_a_users_mistake() -> None:
    values = {"model_name_or_path": "m", "train_dataset": "t.jsonl", "load_best_model_at_end": True}
    with pytest.raises(ConfigError, match="strategy to match"):
        build_arguments("sft", values)
