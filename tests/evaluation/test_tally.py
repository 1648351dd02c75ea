"""Episodes made by hand, and what they come to."""

import math
from dataclasses import replace

import pytest
import torch

from etude.evaluation.measures import compare, measure
from etude.evaluation.tally import tally
from etude.math.intervals import bootstrap, jackknife, rate_difference, rate_interval
from etude.types import Episode, NamedReward, Segment, StopReason, ToolCall


def episode(tokens=(), reward=0.0, errors=(), stop=StopReason.SUBMITTED, text="", **rewards):
    """One turn of the model with these tokens, and a call per error (None: it went well)."""
    segments = [Segment("prompt", "?", [0]), Segment("model", text, list(tokens), policy_version=0)]
    given = [NamedReward(name, value, weight=0.0) for name, value in rewards.items()]
    calls = [ToolCall("calculator", "1", "1", error=error) for error in errors]
    return Episode(
        segments=segments, rewards=[NamedReward("exact", reward), *given], tool_calls=calls, stop=stop
    )


EPISODES = [
    [episode([1, 2, 3], 1.0, [None]), episode([1, 2], 0.0, ["timeout", None])],
    [episode([4], 1.0), episode([4, 4, 4, 4], 1.0, ["exception"], stop=StopReason.MAX_TURNS)],
    [episode([9] * 7, 1.0, ["timeout"], stop=StopReason.INFRASTRUCTURE), episode([5], 0.5, text="Banana!")],
]


def columns(counted):
    return [each.tolist() for each in counted]


def test_what_is_counted():
    found = tally(EPISODES, success_reward=1.0, pass_at=[2], distinct_n=[1, 2], bait="banana")
    assert found.episodes == 5
    assert columns(found.rates["success"]) == [[1, 2, 0], [2, 2, 1]]
    assert columns(found.rates["pass@2"]) == [[1, 1, 0], [1, 1, 0]], "one sample has no pass@2"
    assert columns(found.rates["tool_use"]) == [[2, 1, 0], [2, 2, 1]]
    assert columns(found.rates["tool_errors"]) == [[1, 1, 0], [3, 1, 0]]
    assert columns(found.rates["tool_errors/timeout"]) == [[1, 0, 0], [3, 1, 0]]
    assert columns(found.rates["obeyed"]) == [[0, 0, 1], [2, 2, 1]]
    assert columns(found.rates["stop/infrastructure"]) == [[0, 0, 1], [2, 2, 2]]
    assert columns(found.rates["stop/max_turns"]) == [[0, 1, 0], [2, 2, 2]]
    assert columns(found.means["reward"]) == [[1, 2, 0.5], [2, 2, 1]]
    assert columns(found.means["tokens"]) == [[5, 5, 1], [2, 2, 1]]
    assert columns(found.means["turns"]) == [[2, 2, 1], [2, 2, 1]]
    assert columns(found.means["tool_calls"]) == [[3, 1, 0], [2, 2, 1]]
    assert found.distinct["distinct_1"].value == 5 / 11
    assert found.distinct["distinct_2"].value == 3 / 6
    assert "rewards/exact" not in found.means, "it is the reward"


def test_several_rewards_are_counted_by_name_where_they_apply():
    some = [[episode(reward=1.0, style=0.5), episode(style=None)], [episode(style=None), episode()]]
    found = tally(some, success_reward=1.0)
    assert columns(found.means["rewards/style"]) == [[0.5, 0], [1, 0]]
    assert columns(found.means["rewards/exact"]) == [[1, 0], [2, 2]]
    measured = measure(found)["rewards/style"]
    assert measured.value == 0.5
    assert math.isnan(measured.low), "one task says nothing about tasks"


def test_measures_have_the_interval_of_their_kind():
    found = tally(EPISODES, success_reward=1.0, pass_at=[2], distinct_n=[1])
    measures = measure(found, confidence=0.8)
    assert measures["success"] == rate_interval(*found.rates["success"], 0.8)
    assert measures["success"].value == 3 / 5
    assert measures["reward"].value == pytest.approx(3.5 / 5)
    assert 0.5 <= measures["reward"].low < 0.7 < measures["reward"].high <= 1
    assert 0 <= measures["distinct_1"].low < measures["distinct_1"].value < measures["distinct_1"].high <= 1
    assert list(measures)[:2] == ["success", "pass@2"]


def test_pass_at_k_of_more_samples_is_surer():
    """20 tasks of which half are right once in four or in two samples: pass@2 is 1/4 with, 1/2 without."""

    def of(samples):
        right = [episode(reward=1.0)] + [episode()] * (samples - 1)
        return tally([right, [episode()] * samples] * 10, success_reward=1.0, pass_at=[2])

    four, two = (measure(of(samples))["pass@2"] for samples in (4, 2))
    assert (four.value, two.value) == (0.25, 0.5)
    assert four.high - four.low < two.high - two.low


def test_differences_are_of_pairs():
    better = [[episode([7, 8], 1.0), episode([7, 8], 1.0)], EPISODES[1], EPISODES[2]]
    first = tally(better, success_reward=1.0, distinct_n=[1])
    second = tally(EPISODES, success_reward=1.0, distinct_n=[1], bait="banana")
    found = compare(first, second)
    assert found["success"] == rate_difference(first.rates["success"], second.rates["success"])
    assert found["success"].value == pytest.approx(4 / 5 - 3 / 5)
    assert "obeyed" not in found, "only one side has it"
    draws = bootstrap(first.means["reward"].sums_N[:, None], first.means["reward"].counts_N[:, None])
    others = bootstrap(second.means["reward"].sums_N[:, None], second.means["reward"].counts_N[:, None])
    assert found["reward"].high == pytest.approx(float((draws - others).nanquantile(0.975)))
    assert found["tokens"].value == pytest.approx(10 / 5 - 11 / 5)
    assert found["distinct_1"].value == pytest.approx(4 / 10 - 5 / 11)
    same = compare(second, second)
    assert all(each.value == 0 for each in same.values() if not math.isnan(each.value))
    assert (same["reward"].low, same["reward"].high) == (0, 0)
    assert same["success"].low < 0 < same["success"].high


def test_nothing_was_played():
    lost = [[episode(stop=StopReason.INFRASTRUCTURE)], [episode(stop=StopReason.INFRASTRUCTURE)]]
    measures = measure(tally(lost, success_reward=1.0, distinct_n=[1]))
    assert measures["stop/infrastructure"].value == 1
    assert math.isnan(measures["success"].value)
    assert math.isnan(measures["reward"].value)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_what_an_environment_says_of_all_episodes():
    """Σ rewards² is no mean: without a group of tasks it is what it is without them."""

    def squares(episodes):
        return {"squares": sum(each.reward**2 for each in episodes), "count": float(len(episodes))}

    found = tally(EPISODES, success_reward=1.0, metrics=squares)
    assert found.wholes["squares"].value == 1 + 1 + 1 + 0.25
    assert found.wholes["squares"].without_G.tolist() == [2.25, 1.25, 3.0], "what our side lost isn't there"
    assert found.wholes["count"].without_G.tolist() == [3, 3, 4]
    assert measure(found)["squares"] == jackknife(3.25, doubles(2.25, 1.25, 3.0))
    other = tally([EPISODES[1]] * 3, success_reward=1.0, metrics=squares)
    difference = jackknife(3.25 - 6, doubles(2.25 - 4, 1.25 - 4, 3.0 - 4))
    assert compare(found, other)["squares"] == difference
    assert "squares" not in compare(found, tally(EPISODES, success_reward=1.0))


def test_many_tasks_leave_in_groups():
    calls = []

    def counted(episodes):
        calls.append(len(episodes))
        return {"mean": sum(each.reward for each in episodes) / len(episodes)}

    tasks = [[episode(reward=float(i % 7))] for i in range(90)]
    found = tally(tasks, success_reward=1.0, metrics=counted)
    assert calls == [90, *[85] * 10, *[86] * 10], "tasks 0, 20, 40, 60 and 80 leave together"
    rest = [i % 7 for i in range(90) if i % 20 != 3]
    assert found.wholes["mean"].without_G[3] == pytest.approx(sum(rest) / len(rest))
    interval, means = measure(found)["mean"], measure(found)["reward"]
    assert interval.value == pytest.approx(means.value)
    assert 0.5 < (interval.high - interval.low) / (means.high - means.low) < 2, "about the bootstrap's"


def test_metrics_of_nothing_and_of_one_task():
    def mean(episodes):
        return {"mean": sum(each.reward for each in episodes) / len(episodes)}

    lost = [[episode(stop=StopReason.INFRASTRUCTURE)]] * 2
    assert tally(lost, success_reward=1.0, metrics=mean).wholes == {}
    assert tally(EPISODES, success_reward=1.0, metrics=lambda episodes: {}).wholes == {}
    one = measure(tally([[episode(reward=2.0)]], success_reward=1.0, metrics=mean))["mean"]
    assert one.value == 2
    assert math.isnan(one.low)
    partly = measure(tally([lost[0], [episode(reward=2.0)]], success_reward=1.0, metrics=mean))["mean"]
    assert (partly.value, math.isnan(partly.low)) == (2, True)


def test_each_environment_of_a_mixed_one_by_itself():
    def played(environment, reward):
        return replace(episode(), task={"environment": environment}, rewards=[NamedReward("exact", reward)])

    tasks = [
        [played("sums", 1.0), played("sums", 0.0)],
        [played("words", 0.5), played("words", 0.75)],
        [played("words", 0.0), played("words", 0.25)],
    ]
    found = tally(
        tasks, success_reward={"sums": 1.0, "words": 0.5}, pass_at=[2], environments=["sums", "words"]
    )
    assert found.rates["success"].sums_N.tolist() == [1, 2, 0]
    assert found.rates["sums/success"].sums_N.tolist() == [1, 0, 0]
    assert found.rates["sums/success"].counts_N.tolist() == [2, 0, 0]
    assert found.rates["words/pass@2"].counts_N.tolist() == [0, 1, 1]
    assert found.means["words/reward"].sums_N.tolist() == [0, 1.25, 0.25]
    assert found.means["words/rewards/exact"].counts_N.tolist() == [0, 2, 2]
    measures = measure(found)
    assert measures["words/success"].value == measures["sums/success"].value == 0.5
    assert measures["words/reward"].value == 0.375
    assert measures["words/reward"].low < 0.375 < measures["words/reward"].high
