import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import ConfigError, RewardError
from etude.rewards.scores import check_scores, check_weight
from etude.types import Episode, Segment


def prompted(*prompts):
    return [Episode(segments=[Segment("prompt", prompt, [])]) for prompt in prompts]


FOUR = prompted("one", "two", "three " * 30, "four")


@pytest.mark.parametrize(
    "scores",
    [
        [1, 0.0, True, False],
        (np.float32(1), np.int64(0), np.bool_(True), np.zeros(1)),
        [torch.tensor(1.0), torch.tensor([0]), torch.tensor(True), torch.zeros((), dtype=torch.bfloat16)],
        torch.tensor([1.0, 0, 1, 0], requires_grad=True),
        np.array([1, 0, 1, 0]),
    ],
)
def test_numbers_of_every_kind(scores):
    checked = check_scores(scores, "r", FOUR)
    assert checked == [1.0, 0.0, 1.0, 0.0]
    assert {type(score) for score in checked} == {float}


def test_none_stays():
    assert check_scores([None, 1, None, 2], "r", FOUR) == [None, 1.0, None, 2.0]
    assert check_scores([], "r", []) == []


@pytest.mark.parametrize(
    "bad",
    [math.nan, math.inf, -math.inf, 10**400, "1.0", 1j, [1.0], torch.ones(2), np.nan, torch.tensor(math.nan)],
)
def test_what_is_not_a_finite_number(bad):
    with pytest.raises(
        RewardError, match=r"reward 'exact' returned .* for episode 1, prompt 'two'; expected a"
    ):
        check_scores([1, bad, 1, 1], "exact", FOUR)


def test_bad_episodes_are_named():
    nan = math.nan
    with pytest.raises(RewardError, match=r"for episode 0, prompt 'one' \(and for 2 more: 2, 3\)"):
        check_scores([nan, 1.0, nan, nan], "exact", FOUR)
    with pytest.raises(RewardError, match=r"\(and for 39 more: 1, 2, 3, 4, 5, 6, 7, 8, …\)"):
        check_scores([nan] * 40, "exact", FOUR * 10)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            [1, 2],
            "returned 2 scores for 4 episodes .*the first without a score is episode 2, prompt 'three .*…",
        ),
        ([1] * 5, "returned 5 scores for 4 episodes .*the last are too many"),
        (1.0, "returned 1.0; expected a list of 4 scores"),
        (torch.tensor(1.0), "returned 1.0; expected a list"),
        ("1111", "expected a list"),
        ({"a": 1}, "expected a list"),
        (None, "returned None; expected a list"),
        (torch.ones(4, 2), r"returned \[1.0, 1.0\] for episode 0"),
    ],
)
def test_wrong_shapes(scores, message):
    with pytest.raises(RewardError, match=message):
        check_scores(scores, "exact", FOUR)


def test_an_episode_without_text_is_named_by_its_task():
    with pytest.raises(RewardError, match="episode 0, prompt 'from the task'"):
        check_scores([math.nan], "r", [Episode(task={"prompt": "from the task"})])


@given(st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False), max_size=8))
def test_finite_scores_are_unchanged(scores):
    assert check_scores(scores, "r", prompted(*["p"] * len(scores))) == scores


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None])
def test_weights(weight):
    with pytest.raises(ConfigError, match="weight of reward 'r'"):
        check_weight(weight, "r")


def of_turns(*counts):
    """Episodes with so many turns of one sampled token each."""
    return [
        Episode(
            segments=[
                Segment("prompt", f"task {i}", [0]),
                *[
                    s
                    for _ in range(n)
                    for s in (Segment("model", "a", [1], policy_version=0), Segment("tool", "b", [2]))
                ],
            ]
        )
        for i, n in enumerate(counts)
    ]


@pytest.mark.parametrize("level", ["turn", "token"])
@pytest.mark.parametrize(
    "scores",
    [
        [[1, None], None, [], [0.5, 0, True]],
        ((np.float32(1), None), None, np.zeros(0), torch.tensor([0.5, 0, 1])),
        [[torch.tensor(1.0), None], None, (), np.array([0.5, 0, 1])],
    ],
)
def test_scores_within_episodes(level, scores):
    assert check_scores(scores, "r", of_turns(2, 1, 0, 3), level) == [[1.0, None], None, [], [0.5, 0.0, 1.0]]


def test_a_table_of_scores():
    assert check_scores(torch.ones(2, 3), "r", of_turns(3, 3), "turn") == [[1.0, 1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("level", "scores", "message"),
    [
        (
            "turn",
            [[1.0], [1.0, 2.0]],
            "reward 'exact' returned 2 scores for the 3 turns of episode 1, prompt 'task 1'; "
            "expected one per turn: a number, or None where it does not apply",
        ),
        (
            "token",
            [[], [1.0] * 3],
            "reward 'exact' returned 0 scores for the 1 sampled token of episode 0, prompt 'task 0'; "
            "expected one per sampled token",
        ),
        (
            "turn",
            [1.0, [1.0] * 3],
            "returned 1.0 for episode 0, prompt 'task 0'; expected a list of 1 scores, one per turn",
        ),
        ("turn", ["1", [1.0] * 3], "returned '1' for episode 0, .*; expected a list of 1 scores"),
        (
            "turn",
            [[1.0], [0, math.nan, 1]],
            "returned nan for turn 1 of episode 1, prompt 'task 1'; expected a finite",
        ),
        ("token", [["x"], None], "returned 'x' for sampled token 0 of episode 0"),
        (
            "turn",
            [[1.0]],
            "returned 1 scores for 2 episodes .*episode 1, .*expected one per episode: a list with a",
        ),
        (
            "turn",
            None,
            "returned None; expected a list of 2 scores, one per episode: a list with a score per turn",
        ),
        ("episode", [[1.0], [1.0] * 3], 'expected a finite number, .* A list per episode needs level="turn"'),
    ],
)
def test_wrong_scores_within_episodes(level, scores, message):
    with pytest.raises(RewardError, match=message):
        check_scores(scores, "exact", of_turns(1, 3), level)
