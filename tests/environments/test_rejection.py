"""Rejection sampling: what is played, what is written, and that nothing is lost or played twice."""

import json

import pytest

from etude.data.files import load_rows
from etude.data.selection import Selection
from etude.environments.rejection import sample_dataset
from etude.environments.text import TextEnvironment
from etude.errors import CheckpointError, ConfigError, DataError
from etude.math.kl import best_of_n_kl
from etude.runtime.run import RunDirectory

TASKS = [{"prompt": f"{i}+{i}=", "goal": i} for i in range(5)]


def likes_digits(completions, goal):
    assert len(completions) == len(goal)
    return [float(sum(c.isdigit() for c in text)) for text in completions]


@pytest.fixture
def make_environment(make_llama, tokenizer):
    def make(rewards=likes_digits, slots=4):
        generation = {"max_new_tokens": 8}
        return TextEnvironment(
            make_llama(), tokenizer, rewards=rewards, slots=slots, generation_kwargs=generation
        )

    return make


@pytest.fixture
def environment(make_environment):
    return make_environment()


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def stored(directory):
    groups = RunDirectory(directory).read_groups()
    return {task: [(e.completion, e.seed, e.reward) for e in groups[task]] for task in sorted(groups)}


def test_the_best_of_each_task_is_written(environment, tmp_path):
    summary = sample_dataset(environment, TASKS, tmp_path, num_samples=3, seed=1)
    groups = RunDirectory(tmp_path).read_groups()
    assert sorted(groups) == [0, 1, 2, 3, 4]
    assert all(len(episodes) == 3 for episodes in groups.values())
    assert len({e.completion for episodes in groups.values() for e in episodes}) > 10
    rows = rows_of(summary.file)
    assert summary.file == tmp_path / "segments.jsonl"
    assert [row["task"] for row in rows] == [0, 1, 2, 3, 4]
    best = [max(episode.reward for episode in groups[task]) for task in range(5)]
    assert [row["reward"] for row in rows] == best
    assert (summary.rows, summary.tasks, summary.episodes) == (5, 5, 15)
    assert summary.best_reward == pytest.approx(sum(best) / 5)
    assert summary.reward == pytest.approx(sum(e.reward for g in groups.values() for e in g) / 15)
    assert summary.kl_bound == best_of_n_kl(3)
    assert RunDirectory(tmp_path).read_summary()["kl_bound"] == best_of_n_kl(3)


def test_slots_and_order_change_nothing(make_environment, tmp_path):
    sample_dataset(make_environment(slots=1), TASKS, tmp_path / "one", num_samples=2, seed=1)
    sample_dataset(make_environment(slots=16), TASKS, tmp_path / "many", num_samples=2, seed=1)
    one, many = ((tmp_path / name / "segments.jsonl").read_text() for name in ("one", "many"))
    assert one == many
    sample_dataset(make_environment(), TASKS, tmp_path / "other", num_samples=2, seed=2)
    assert (tmp_path / "other" / "segments.jsonl").read_text() != one


def test_a_killed_run_goes_on_where_it_was(make_environment, tmp_path):
    sample_dataset(make_environment(), TASKS, tmp_path / "whole", num_samples=3, seed=1)
    calls = []

    def breaks(completions, goal):
        calls.append(goal[0])
        if len(calls) == 3:
            raise RuntimeError("the power is gone")
        return likes_digits(completions, goal)

    breaks.__name__ = "likes_digits"
    with pytest.raises(RuntimeError, match="the power is gone"):
        sample_dataset(make_environment(breaks), TASKS, tmp_path / "killed", num_samples=3, seed=1)
    file = tmp_path / "killed" / "episodes.jsonl"
    assert len(RunDirectory(tmp_path / "killed").read_groups()) == 2
    with file.open("ab") as stream:  # one more task, of which one episode and a half got to the disk
        lines = (tmp_path / "whole" / "episodes.jsonl").read_bytes().splitlines(keepends=True)
        missing = next(task for task in range(5) if task not in RunDirectory(file.parent).read_groups())
        first, second, _ = (line for line in lines if json.loads(line)["step"] == missing)
        stream.write(first + second[:60])
    played = []

    def counts(completions, goal):
        played.extend(goal)
        return likes_digits(completions, goal)

    counts.__name__ = "likes_digits"
    sample_dataset(make_environment(counts), TASKS, file.parent, num_samples=3, seed=1, resume=True)
    assert played.count(missing) == 2
    assert len(played) == 15 - 6 - 1
    assert stored(file.parent) == stored(tmp_path / "whole")
    killed, whole = ((tmp_path / name / "segments.jsonl").read_text() for name in ("killed", "whole"))
    assert killed == whole


def test_another_choice_plays_nothing_again(environment, tmp_path):
    sample_dataset(environment, TASKS, tmp_path, num_samples=3, seed=1)
    before = (tmp_path / "episodes.jsonl").read_bytes()
    summary = sample_dataset(
        environment, TASKS, tmp_path, Selection("preference"), num_samples=3, seed=1, resume=True
    )
    assert (tmp_path / "episodes.jsonl").read_bytes() == before
    assert summary.kl_bound is None
    assert (tmp_path / "segments.jsonl").exists()
    for row in rows_of(tmp_path / "preference.jsonl"):
        assert (
            row["margin"] == row["chosen_rewards"]["likes_digits"] - row["rejected_rewards"]["likes_digits"]
        )
        assert row["margin"] > 0
    assert load_rows(tmp_path / "preference.jsonl").column_names[:4] == [
        *("prompt", "chosen", "rejected", "margin")
    ]


def test_more_samples_add_to_those_that_are_there(make_environment, tmp_path):
    for n in (2, 4):
        sample_dataset(make_environment(), TASKS, tmp_path / "grown", num_samples=n, seed=1, resume=n > 2)
    sample_dataset(make_environment(), TASKS, tmp_path / "at_once", num_samples=4, seed=1)
    assert stored(tmp_path / "grown") == stored(tmp_path / "at_once")
    summary = sample_dataset(
        make_environment(), TASKS, tmp_path / "grown", num_samples=2, seed=1, resume=True
    )
    assert summary.episodes == 10, "fewer samples are the first ones"


def test_what_is_there_is_not_mixed_with_something_else(environment, tmp_path):
    sample_dataset(environment, TASKS, tmp_path, seed=1, settings={"model": "a"})
    before = (tmp_path / "episodes.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="holds episodes; go on with them by resume"):
        sample_dataset(environment, TASKS, tmp_path, seed=1, settings={"model": "a"})
    with pytest.raises(CheckpointError, match="with seed 1, and now it is 2"):
        sample_dataset(environment, TASKS, tmp_path, seed=2, settings={"model": "a"}, resume=True)
    with pytest.raises(CheckpointError, match="with model 'a', and now it is 'b'"):
        sample_dataset(environment, TASKS, tmp_path, seed=1, settings={"model": "b"}, resume=True)
    for tasks in (TASKS[::-1], TASKS[:2]):
        with pytest.raises(DataError, match="the same tasks in the same order"):
            sample_dataset(environment, tasks, tmp_path, seed=1, settings={"model": "a"}, resume=True)
    assert (tmp_path / "episodes.jsonl").read_bytes() == before


def test_bad_settings(environment, tmp_path):
    with pytest.raises(ConfigError, match="num_samples is 0"):
        sample_dataset(environment, TASKS, tmp_path, num_samples=0)
    with pytest.raises(ConfigError, match="between two episodes"):
        sample_dataset(environment, TASKS, tmp_path, Selection("preference"), num_samples=1)
    assert not (tmp_path / "run.yaml").exists()
