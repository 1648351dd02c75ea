"""Which task comes when."""

from collections import Counter

import pytest
import torch
from datasets import Dataset, DatasetDict

from etude.environments.mixed import MixedEnvironment
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, DataError
from etude.math.counters import mix
from etude.trainers.tasks import Tasks, load_tasks


@pytest.fixture
def mixed(tokenizer):
    def make(weights=None, **settings):
        parts = {name: TextEnvironment(None, tokenizer) for name in ("a", "b", "c")}
        return MixedEnvironment(parts, weights, **settings)

    return make


def rows_of(**counts):
    return [{"environment": name, "prompt": f"{name}{i}"} for name, n in counts.items() for i in range(n)]


def test_one_environment_goes_through_all_rows_anew_each_time():
    rows = [{"prompt": str(i)} for i in range(7)]
    tasks = Tasks(rows, seed=5)
    epochs = [[tasks.at(7 * epoch + i)["prompt"] for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == [row["prompt"] for row in rows] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    orders = [torch.randperm(7, generator=torch.Generator().manual_seed(mix(5, 1, e))) for e in range(3)]
    assert epochs == [[str(int(i)) for i in order] for order in orders]


def test_by_weight_and_each_in_an_order_of_its_own(mixed):
    rows = rows_of(a=4, b=40, c=2)
    tasks = Tasks(rows, 5, mixed({"a": 2, "b": 1, "c": 0}))
    played = [tasks.at(i) for i in range(48)]
    assert Counter(task["environment"] for task in played) == {"a": 32, "b": 16}
    for start in range(0, 48, 6):
        share = Counter(task["environment"] for task in played[start : start + 6])
        assert share == {"a": 4, "b": 2}, "every stretch has its share"
    own = [task["prompt"] for task in played if task["environment"] == "a"]
    epochs = [own[start : start + 4] for start in range(0, 32, 4)]
    assert all(sorted(epoch) == ["a0", "a1", "a2", "a3"] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 3
    assert len({task["prompt"] for task in played if task["environment"] == "b"}) == 16


def test_without_weights_in_proportion_to_rows(mixed):
    rows = rows_of(a=3, b=30, c=9)
    tasks = Tasks(rows, 5, mixed())
    for epoch in range(2):
        played = [tasks.at(42 * epoch + i)["prompt"] for i in range(42)]
        assert sorted(played) == sorted(row["prompt"] for row in rows), "an epoch is all rows"


def test_any_place_is_known_without_those_before_it(mixed):
    rows = rows_of(a=4, b=7, c=5)
    whole = Tasks(rows, 2, mixed({"a": 1, "b": 3, "c": 0.5}))
    played = [whole.at(i) for i in range(100)]
    for number in (99, 0, 50, 98, 51):
        assert Tasks(rows, 2, mixed({"c": 0.5, "b": 3, "a": 1})).at(number) == played[number]
    other = Tasks(rows, 3, mixed({"a": 1, "b": 3, "c": 0.5}))
    assert [other.at(i) for i in range(100)] != played


def test_tasks_besides(mixed):
    tasks = Tasks(rows_of(a=20, b=20, c=20), 2, mixed({"a": 3, "b": 1, "c": 0}))
    drawn = [tasks.some(4, stream) for stream in range(400)]
    names = Counter(task["environment"] for some in drawn for task in some)
    assert names["c"] == 0
    assert 1150 < names["a"] < 1250
    assert all(len({task["prompt"] for task in some}) == 4 for some in drawn)
    assert len({some[0]["prompt"] for some in drawn}) == 40
    assert tasks.some(4, 7) == drawn[7]
    assert len(tasks.some(50, 7)) == 50


def test_a_dataset_by_environment(mixed, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"query": "x", "answer": 3}\n')
    dataset = {"a": ["one", "two"], "b": tmp_path / "b.jsonl"}
    assert load_tasks(dataset, mixed(), "train_dataset") == [
        {"prompt": "one", "environment": "a"},
        {"prompt": "two", "environment": "a"},
        {"query": "x", "answer": 3, "environment": "b"},
    ]
    with pytest.raises(DataError, match="train_dataset is by environment and has 'd'; expected 'a' or 'b'"):
        load_tasks({"d": ["one"]}, mixed(), "train_dataset")


def test_the_splits_of_a_dataset_are_not_environments(mixed):
    part = Dataset.from_list(rows_of(a=2))
    splits = DatasetDict({"train": part, "test": part})
    assert load_tasks(splits, mixed(), "train_dataset") == rows_of(a=2)
    by_environment = DatasetDict({"b": Dataset.from_list([{"prompt": "x"}])})
    assert load_tasks(by_environment, mixed(), "train_dataset") == [{"prompt": "x", "environment": "b"}]


def test_rows_that_nobody_plays_show_at_once(mixed, tokenizer):
    rows = [*rows_of(a=1), {"environment": "z", "prompt": "x"}]
    with pytest.raises(DataError, match="row 1 of eval_dataset: a task's environment is 'z'"):
        load_tasks(rows, mixed(), "eval_dataset")
    assert load_tasks(["x"], mixed(default="c"), "train_dataset") == [{"prompt": "x"}]
    assert Tasks([{"prompt": "x"}], 0, mixed(default="c")).at(3) == {"prompt": "x"}
    assert load_tasks(rows, TextEnvironment(None, tokenizer), "eval_dataset") == rows
    assert load_tasks(None, mixed(), "eval_dataset") == []
    with pytest.raises(ConfigError, match="'b' has a weight of 1 and no tasks"):
        Tasks(rows_of(a=3), 0, mixed({"a": 1, "b": 1, "c": 0}))
