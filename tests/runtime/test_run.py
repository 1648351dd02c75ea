"""The run directory keeps what it was given, and survives being killed at any instant."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etude.errors import CheckpointError, ConfigError
from etude.runtime.run import RunDirectory
from etude.types import Episode, NamedReward, Segment, StopReason, ToolCall

each_example_makes_its_own = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def calculator_episode(answer: str = "12") -> Episode:
    return Episode(
        task={"prompt": "3*4?", "answer": "12"},
        segments=[
            Segment("prompt", "3*4?", [1, 2]),
            Segment("model", "<calculator>3*4<call>", [3, 4], [-0.5, -0.25], [-0.5, -0.25], policy_version=7),
            Segment("tool", "12<response>", [5]),
            Segment("model", answer, [6], [-0.125], [-0.125], policy_version=7),
        ],
        rewards=[NamedReward("exact", 1.0), NamedReward("polite", None, weight=0.5, position=3)],
        stop=StopReason.SUBMITTED,
        tool_calls=[ToolCall("calculator", "3*4", "12", seconds=0.01)],
        seed=11,
        timings={"total": 0.5},
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "one")


def save(run: RunDirectory, *steps: int) -> None:
    for step in steps:
        with run.checkpoint(step) as directory:
            (directory / "weights").write_text(str(step))


def test_making_one_touches_nothing(run: RunDirectory) -> None:
    assert run.read_metrics() == run.read_episodes() == []
    assert run.read_summary() == {}
    assert run.latest_checkpoint() is run.best_checkpoint() is None
    assert not run.path.exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file can't be a run directory.*another output_dir"):
        RunDirectory(tmp_path / "file").append_metrics(1, {})
    with pytest.raises(CheckpointError, match="a file is in the way"):
        RunDirectory(tmp_path / "file" / "below").append_metrics(1, {})


# Configuration and summary


def a_reward(prompts: list[str]) -> list[float]:
    return [0.0 for _ in prompts]


def test_config_round_trip(run: RunDirectory) -> None:
    @dataclass
    class Lora:
        rank: int = 8

    config = {
        "lr": 1e-4,
        "clip": math.inf,
        "reward": a_reward,
        "path": Path("a/b"),
        "lora": Lora(),
        "é": (1, 2),
    }
    run.write_config(config)
    assert run.read_config() == {
        "lr": 1e-4,
        "clip": math.inf,
        "reward": f"{a_reward.__module__}:a_reward",
        "path": "a/b",
        "lora": {"rank": 8},
        "é": [1, 2],
    }
    assert list(run.read_config()) == list(config)
    assert (run.path / "run.yaml").exists()


def test_a_missing_or_broken_config_is_named(run: RunDirectory) -> None:
    with pytest.raises(CheckpointError, match=r"run\.yaml can't be read.*Check the path"):
        run.read_config()
    run.write_config({})
    (run.path / "run.yaml").write_text("a: [1")
    with pytest.raises(CheckpointError, match=r"run\.yaml can't be read"):
        run.read_config()


def test_summary_is_merged(run: RunDirectory) -> None:
    run.update_summary({"before": {"success": np.float32(0.25)}})
    run.update_summary({"after": torch.tensor(0.5, dtype=torch.bfloat16), "seconds": math.nan})
    assert run.read_summary() == {"before": {"success": 0.25}, "after": 0.5, "seconds": None}
    (run.path / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"summary\.json is not JSON"):
        run.read_summary()


# Rows


def test_metrics_of_every_kind_become_numbers(run: RunDirectory) -> None:
    run.append_metrics(
        3,
        {
            "python": 1.5,
            "numpy": np.float64(2.5),
            "integer": np.int64(4),
            "tensor": torch.tensor(0.5, requires_grad=True),
            "array": np.array([1.0, math.nan]),
            "nan": math.nan,
            "inf": torch.tensor(-math.inf),
        },
    )
    (row,) = run.read_metrics()
    assert abs(row.pop("time") - (run.path / "metrics.jsonl").stat().st_mtime) < 60
    assert row == {
        "step": 3,
        "python": 1.5,
        "numpy": 2.5,
        "integer": 4,
        "tensor": 0.5,
        "array": [1.0, None],
        "nan": None,
        "inf": None,
    }


def test_a_metric_cannot_take_a_rows_own_name(run: RunDirectory) -> None:
    with pytest.raises(CheckpointError, match="'time'"):
        run.append_metrics(1, {"time": 3.0})


def test_episodes_round_trip(run: RunDirectory) -> None:
    first, second, third = (calculator_episode(answer) for answer in ("12", "13", "\ud800\u2028\x1b<é>"))
    run.append_episodes(0, "before", [first])
    run.append_episodes(1, "train", [second, third])
    assert run.read_episodes() == [first, second, third]
    assert run.read_episodes(step=1) == [second, third]
    assert run.read_episodes(split="before") == [first]
    assert run.read_episodes(step=1, split="before") == []
    assert run.read_episodes(limit=2) == [first, second]
    assert run.read_episodes(step=1, limit=1) == [second]
    assert run.read_episodes(limit=0) == []


def test_token_strings_are_written_beside_the_episode(run: RunDirectory) -> None:
    speller = SimpleNamespace(convert_ids_to_tokens=lambda ids: [f"t{i}" for i in ids])
    run.append_episodes(1, "train", [calculator_episode()], tokenizer=speller)
    row = json.loads((run.path / "episodes.jsonl").read_text())
    assert [segment["tokens"] for segment in row["segments"]] == [["t1", "t2"], ["t3", "t4"], ["t5"], ["t6"]]
    assert run.read_episodes() == [calculator_episode()]


def test_an_unknown_split_is_an_error(run: RunDirectory) -> None:
    with pytest.raises(
        ConfigError, match="split is 'test'; expected one of train, validation, before, after"
    ):
        run.append_episodes(1, "test", [])  # type: ignore[arg-type]


@each_example_makes_its_own
@given(cut=st.integers(min_value=0))
def test_a_file_cut_anywhere_loses_only_the_unfinished_row(tmp_path: Path, cut: int) -> None:
    run = RunDirectory(tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.unlink(missing_ok=True)
    for step in range(3):
        run.append_metrics(step, {"näme": step})
    whole = file.read_bytes()
    cut %= len(whole) + 1
    file.write_bytes(whole[:cut])

    finished = whole[:cut].count(b"\n")
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2][:finished]
    run.append_metrics(9, {})
    assert [row["step"] for row in run.read_metrics()] == [*[0, 1, 2][:finished], 9]


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b"{}\n", b"\xff\n"])
def test_a_broken_line_within_is_named(run: RunDirectory, line: bytes) -> None:
    run.append_metrics(1, {})
    with (run.path / "metrics.jsonl").open("ab") as stream:
        stream.write(line)
    run.append_metrics(2, {})
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2 can't be read.*delete the line"):
        run.read_metrics()


# Checkpoints


def test_a_checkpoint_appears_only_when_it_is_complete(run: RunDirectory) -> None:
    with run.checkpoint(10) as directory:
        (directory / "deep").mkdir()
        (directory / "deep" / "weights").write_text("10")
        assert run.latest_checkpoint() is None
    assert run.latest_checkpoint() == run.path / "checkpoint-10"
    assert (run.path / "checkpoint-10" / "deep" / "weights").read_text() == "10"
    assert os.listdir(run.path) == ["checkpoint-10"]


def test_a_failed_save_leaves_the_old_checkpoint(run: RunDirectory) -> None:
    def save_and_be_interrupted() -> None:
        with run.checkpoint(10) as directory:
            (directory / "weights").write_text("half")
            raise KeyboardInterrupt

    save(run, 10)
    with pytest.raises(KeyboardInterrupt):
        save_and_be_interrupted()
    assert os.listdir(run.path) == ["checkpoint-10"]
    assert (run.path / "checkpoint-10" / "weights").read_text() == "10"


def test_the_same_step_is_replaced(run: RunDirectory) -> None:
    save(run, 10)
    with run.checkpoint(10) as directory:
        (directory / "other").write_text("new")
    assert os.listdir(run.path) == ["checkpoint-10"]
    assert os.listdir(run.path / "checkpoint-10") == ["other"]


def test_killed_while_replacing(run: RunDirectory) -> None:
    """The instant between the two renames: the old checkpoint still counts, and the next save tidies up."""
    save(run, 9, 10)
    (run.path / "checkpoint-10").rename(run.path / ".replaced-checkpoint-10")
    (run.path / ".writing-checkpoint-10").mkdir()
    latest = run.latest_checkpoint()
    assert latest is not None
    assert (latest / "weights").read_text() == "10"
    save(run, 10)
    assert sorted(os.listdir(run.path)) == ["checkpoint-10", "checkpoint-9"]


def test_checkpoints_are_ordered_by_number(run: RunDirectory) -> None:
    save(run, 9, 100, 20)
    (run.path / "checkpoint-best").mkdir()
    assert list(run.checkpoints()) == [9, 20, 100]
    assert run.latest_checkpoint() == run.path / "checkpoint-100"


def test_pruning_keeps_the_newest_and_the_best(run: RunDirectory) -> None:
    save(run, 1, 2, 3, 4, 5)
    run.mark_best(2)
    (run.path / ".writing-checkpoint-6").mkdir()
    (run.path / ".deleted-checkpoint-0").mkdir()
    run.prune(keep=2)
    assert sorted(os.listdir(run.path)) == ["best.json", "checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert run.best_checkpoint() == run.path / "checkpoint-2"
    run.mark_best(5)
    run.prune(keep=2)
    assert list(run.checkpoints()) == [4, 5]
    with pytest.raises(ConfigError, match="keep is 0"):
        run.prune(keep=0)


def test_only_what_is_there_can_be_best(run: RunDirectory) -> None:
    save(run, 1)
    with pytest.raises(CheckpointError, match=r"no checkpoint-7 to protect; expected one of \[1\]"):
        run.mark_best(7)


def test_truncating_returns_to_the_history_at_that_step(run: RunDirectory) -> None:
    for step in range(1, 6):
        run.append_metrics(step, {"reward": step})
        run.append_episodes(step, "train", [calculator_episode(str(step))])
        save(run, step)
    run.mark_best(5)
    with (run.path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 2, "half')
    run.truncate_after(3)
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3]
    assert [episode.last_model_text for episode in run.read_episodes()] == ["1", "2", "3"]
    assert list(run.checkpoints()) == [1, 2, 3]
    assert run.best_checkpoint() is None
    assert not [name for name in os.listdir(run.path) if name.startswith(".")]


def test_truncating_an_empty_directory_is_fine(run: RunDirectory) -> None:
    run.truncate_after(0)
    assert not run.path.exists()
