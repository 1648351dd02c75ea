"""Advantages of groups, with numbers worked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import ConfigError, DataError
from etude.math.group import (
    batch_advantages,
    decoupled_advantages,
    group_advantages,
    leave_one_out_advantages,
)

SCORES = st.lists(st.floats(-10, 10), min_size=2, max_size=6)
KINDS = {
    "rloo": leave_one_out_advantages,
    "grpo": group_advantages,
    "batch": lambda s, g, k=None: group_advantages(s, g, k, scale="batch"),
    "dr_grpo": lambda s, g, k=None: group_advantages(s, g, k, scale="none"),
}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def ids(*sizes):
    return torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])


def test_leave_one_out_by_hand():
    # Group 0: the others of a 1 are 0, 0, 1 with mean 1/3, those of a 0 are 1, 0, 1 with mean 2/3.
    # Group 1: each one's only other is the other.
    advantages = leave_one_out_advantages(double([1, 0, 0, 1, 2, 5]), ids(4, 2))
    torch.testing.assert_close(advantages, double([2 / 3, -2 / 3, -2 / 3, 2 / 3, -3, 3]))


def test_leave_one_out_without_a_dropped_member():
    # Of 1, 0, 0 each 0's others are 1 and 0; what the dropped one scored doesn't matter, be it NaN.
    kept = torch.tensor([True, True, True, False])
    for lost in (99.0, float("nan")):
        advantages = leave_one_out_advantages(double([1, 0, 0, lost]), ids(4), kept)
        assert advantages.tolist() == [1.0, -0.5, -0.5, 0.0]


def test_grpo_by_hand():
    # Mean 3, squares 4 + 0 + 4 over n − 1 = 2: variance 4, deviation 2.
    scores = double([1, 3, 5])
    torch.testing.assert_close(group_advantages(scores, ids(3)), double([-2 / 2.0001, 0, 2 / 2.0001]))
    assert group_advantages(scores, ids(3), scale="none").tolist() == [-2.0, 0.0, 2.0]


def test_grpo_scaled_by_the_batch():
    # Mean of all 3.5: squares 6.25 + .25 + 2.25 + 3 · .25 = 9.5, over 5: variance 1.9. The constant group
    # counts there and has advantage 0.
    advantages = group_advantages(double([1, 3, 5, 4, 4, 4]), ids(3, 3), scale="batch")
    size = 2 / (1.9**0.5 + 1e-4)
    torch.testing.assert_close(advantages, double([-size, 0, size, 0, 0, 0]))


def test_grpo_without_a_dropped_member():
    kept = torch.tensor([True, False, True, True])
    advantages = group_advantages(double([1, -70, 3, 5]), ids(4), kept)
    torch.testing.assert_close(advantages, double([-2 / 2.0001, 0, 0, 2 / 2.0001]))


def test_groups_need_not_lie_together():
    scores, mixed = double([1, 10, 3, 30, 5]), torch.tensor([0, 1, 0, 1, 0])
    assert group_advantages(scores, mixed, scale="none").tolist() == [-2.0, -10.0, 0.0, 10.0, 2.0]
    assert leave_one_out_advantages(scores, mixed).tolist() == [-3.0, -20.0, 0.0, 20.0, 3.0]


def test_decoupled_by_hand():
    # First reward: −2, 0, 2 over a deviation of 2, and constant. Second: ±1 over √2 for those it applies to,
    # and ±2 over 2√2. With weights 1 and 2 the sums of the first group are −1, √2 and 1 − √2, those of
    # the second −√2 and √2 (but for the 1e-4), of mean 0; over n − 1. No reward applies to the last.
    none = float("nan")
    rewards = double([[1, none], [3, 4], [5, 2], [7, 0], [7, 4], [none, none]])
    advantages = decoupled_advantages(rewards, double([1, 2]), ids(3, 3))
    root, little = 2**0.5, 1e-4
    first = [-2 / (2 + little), 0, 2 / (2 + little)]
    near, far = 2 / (root + little), 4 / (2 * root + little)
    sums = double([first[0], near, first[2] - near, -far, far])
    torch.testing.assert_close(advantages[:5], sums / (((sums**2).sum() / 4).sqrt() + little))
    assert advantages[5] == 0


def test_decoupled_rewards_have_a_say_by_their_weight_alone():
    """A reward's unit doesn't matter, where the sum of rewards drowns the small one's."""
    rewards, groups, weights = double([[0, 1], [1, 0], [1, 1], [0, 0]]), ids(4), double([1, 1])
    advantages = decoupled_advantages(rewards, weights, groups)
    torch.testing.assert_close(advantages[0], double(0))
    scaled = decoupled_advantages(rewards * double([1, 1000]), weights, groups)
    torch.testing.assert_close(scaled, advantages, rtol=0, atol=1e-3)
    assert group_advantages((rewards * double([1, 1000])).sum(1), groups)[0] > 0.8


def test_one_decoupled_reward_is_grpo_scaled():
    scores, groups = double([1, 3, 5, 2, 8, 2]), ids(3, 3)
    grouped = group_advantages(scores, groups)
    decoupled = decoupled_advantages(scores[:, None], double([1]), groups)
    torch.testing.assert_close(decoupled, grouped / (grouped.std() + 1e-4))


def test_decoupled_without_dropped_members_and_in_constant_groups():
    kept = torch.tensor([True, True, True, False, True, True])
    rewards = double([[0.1, 1], [0.1, 3], [0.1, 5], [9, 9], [0.1, 0.7], [0.1, 0.7]])
    groups, weights = ids(4, 2), double([1, 1])
    advantages = decoupled_advantages(rewards, weights, groups, kept)
    assert advantages[3:].tolist() == [0.0, 0.0, 0.0]
    assert advantages[1] == 0
    assert advantages[0] == -advantages[2] < 0
    assert not decoupled_advantages(rewards, weights, groups, torch.zeros(6)).any()
    assert not decoupled_advantages(rewards[:, :1], weights[:1], ids(3, 3), kept).any()


def test_batch_baseline_by_hand():
    scores = double([1, 2, 6])
    assert batch_advantages(scores).tolist() == [-2.0, -1.0, 3.0]
    kept = torch.tensor([True, False, True])
    assert batch_advantages(scores, kept).tolist() == [-2.5, 0.0, 2.5]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, 0.7, -1e8 / 3])
def test_a_constant_group_is_exactly_nothing(kind, value):
    """The mean of three times .1 isn't .1; dividing the difference by itself would be an advantage of ±1."""
    scores, groups = double([value] * 3 + [0.0, 1.0]), ids(3, 2)
    advantages = KINDS[kind](scores, groups)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages[3] == -advantages[4] != 0
    assert not KINDS[kind](scores[:3], groups[:3]).any()
    assert batch_advantages(scores[:3]).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_left_alone_or_gone_has_nothing_to_learn_from(kind):
    scores, groups = double([3, 8, 5, 6, 1, 2]), ids(2, 2, 2)
    kept = torch.tensor([True, False, False, False, True, True])
    advantages = KINDS[kind](scores, groups, kept)
    assert advantages[:4].tolist() == [0.0] * 4
    assert advantages[4] == -advantages[5] != 0
    nobody = torch.zeros(6, dtype=torch.bool)
    assert not KINDS[kind](scores, groups, nobody).any()
    assert not batch_advantages(scores, nobody).any()


@settings(deadline=None)
@given(SCORES, st.floats(-100, 100))
def test_leave_one_out_is_the_mean_baseline_enlarged(values, shift):
    n, groups = len(values), torch.zeros(len(values), dtype=torch.long)
    ours = leave_one_out_advantages(double(values), groups)
    centred = group_advantages(double(values), groups, scale="none")
    torch.testing.assert_close(ours, centred * n / (n - 1), atol=1e-9, rtol=1e-9)
    moved = leave_one_out_advantages(double(values) + shift, groups)
    torch.testing.assert_close(ours, moved, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(values=SCORES, order=st.randoms())
def test_the_order_of_episodes_is_nothing(kind, values, order):
    scores = double([*values, *reversed(values)])
    groups = ids(len(values), len(values))
    shuffled = list(range(len(scores)))
    order.shuffle(shuffled)
    advantages = KINDS[kind](scores, groups)
    moved = KINDS[kind](scores[shuffled], groups[shuffled])
    torch.testing.assert_close(moved, advantages[shuffled], atol=1e-9, rtol=1e-9)
    assert advantages.sum().abs() < 1e-9


def test_what_callers_get_wrong():
    with pytest.raises(ConfigError, match=r"group 1 has a single episode.*num_generations"):
        leave_one_out_advantages(double([1, 2, 3]), ids(2, 1))
    with pytest.raises(ConfigError, match="single episode"):
        group_advantages(double([1]), ids(1))
    with pytest.raises(ConfigError, match="scale is 'std'"):
        group_advantages(double([1, 2]), ids(2), scale="std")
    with pytest.raises(DataError, match="shapes differ"):
        group_advantages(double([1, 2]), ids(3))
    with pytest.raises(DataError, match="shapes differ"):
        batch_advantages(double([1, 2]), torch.ones(3))
    with pytest.raises(DataError, match=r"expected \[B, K\] and \[K\]"):
        decoupled_advantages(double([[1, 2], [3, 4]]), double([1]), ids(2))
    with pytest.raises(ConfigError, match="single episode"):
        decoupled_advantages(double([[1, 2]]), double([1, 1]), ids(1))
    with pytest.raises(DataError, match="one per episode"):
        group_advantages(double([[1, 2]]), torch.zeros(1, 2, dtype=torch.long))
