import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from etude.errors import DataError
from etude.math.reward_model import (
    centring_penalty,
    pair_loss,
    pair_probabilities,
    step_log_odds,
    step_loss,
)

NUMBERS = st.floats(-20, 20)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_pairs_by_hand():
    # σ(log 3) = 3/4, σ(−log 3) = 1/4, σ(0) = 1/2.
    chosen, rejected = f64([math.log(3), 0.0, 2.0]).requires_grad_(), f64([0.0, math.log(3), 2.0])
    loss = pair_loss(chosen, rejected)
    torch.testing.assert_close(loss.detach(), f64([math.log(4 / 3), math.log(4), math.log(2)]))
    loss.sum().backward()  # d loss / d r_chosen = σ(…) − 1
    torch.testing.assert_close(chosen.grad, f64([-0.25, -0.75, -0.5]))
    torch.testing.assert_close(pair_probabilities(chosen, rejected).detach(), f64([0.75, 0.25, 0.5]))


def test_a_margin_asks_for_more():
    # log 9 − log 3 = log 3: the loss of scores that lie log 3 apart.
    loss = pair_loss(f64([math.log(9)]), f64([0.0]), f64([math.log(3)]))
    torch.testing.assert_close(loss, f64([math.log(4 / 3)]))


def test_scores_far_apart_stay_finite():
    loss = pair_loss(torch.tensor([-200.0, 200.0]), torch.tensor([200.0, -200.0]))
    assert loss.tolist() == [400.0, 0.0]


def test_centring_by_hand():
    assert centring_penalty(f64([1.0, 3.0]), f64([-1.0, 0.5])).tolist() == [0.0, 12.25]


def test_steps_by_hand():
    logits = f64([[0.0, math.log(3)], [0.0, math.log(3)], [1.0, 1.0 - math.log(3)]])
    loss = step_loss(step_log_odds(logits), torch.tensor([True, False, False]))
    torch.testing.assert_close(loss, f64([math.log(4 / 3), math.log(4), math.log(4 / 3)]))
    # Three of four solutions end well from here: 3/4 log 4/3 + 1/4 log 4.
    soft = step_loss(f64([math.log(3)]), f64([0.75]))
    torch.testing.assert_close(soft, f64([0.75 * math.log(4 / 3) + 0.25 * math.log(4)]))


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans()), min_size=1, max_size=5))
def test_a_steps_loss_is_the_cross_entropy_of_two_labels(rows):
    wrong, right, labels = zip(*rows, strict=True)
    logits_M2 = torch.stack([f64(wrong), f64(right)], dim=1)
    expected = cross_entropy(logits_M2, torch.tensor(labels).long(), reduction="none")
    torch.testing.assert_close(step_loss(step_log_odds(logits_M2), torch.tensor(labels)), expected)


@given(NUMBERS, NUMBERS, st.floats(0, 5))
def test_a_pair_is_a_step_between_two_answers(chosen, rejected, margin):
    odds = f64([chosen - rejected - margin])
    loss = pair_loss(f64([chosen]), f64([rejected]), f64([margin]))
    torch.testing.assert_close(loss, step_loss(odds, torch.tensor([1])))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(DataError, match=r"chosen \(2,\), rejected \(2, 1\)"):
        pair_loss(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(DataError, match="margins"):
        pair_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))
    with pytest.raises(DataError, match="labels"):
        step_loss(torch.zeros(2), torch.zeros(2, 1))
