import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import DataError
from etude.math.likelihood import (
    imitation_loss,
    log_odds,
    odds_ratio_loss,
    policy_weights,
    sequence_sums,
    simpo_loss,
    verbosity_weights,
)
from etude.math.preference import sigmoid_loss

LOG = math.log


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_sequence_sums_by_hand():
    values = f64([1.0, 2.0, 4.0, 8.0]).requires_grad_()
    sums = sequence_sums(values, [2, 0, 2])
    assert sums.tolist() == [3.0, 0.0, 12.0]
    (sums * f64([1.0, 5.0, 2.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 2.0, 2.0]
    with pytest.raises(DataError, match="4 tokens, and the counts add up to 3"):
        sequence_sums(values, [1, 2])


def test_verbosity_weights_by_hand():
    """Answers of 3 and 1 tokens, then of 1 and 2: what one has beyond the other counts a half."""
    weights = verbosity_weights([3, 1, 1, 2], [1, 3, 2, 1], 0.5)
    assert weights.tolist() == [1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 0.5]
    assert verbosity_weights([3, 1], [1, 3], 1.0).tolist() == [1.0] * 4


def test_policy_weights_by_hand():
    """Uniform over 4: Σ p² = ¼, so any draw weighs 1. Then tokens of ½ and ⅛, Σ p² = ¼ both times."""
    uniform = f64([LOG(1 / 4)] * 3)
    torch.testing.assert_close(policy_weights(uniform, uniform, [1, 2]), f64([1.0, 1.0]))
    weights = policy_weights(f64([LOG(1 / 2), LOG(1 / 8)]), f64([LOG(1 / 4)] * 2), [2])
    torch.testing.assert_close(weights, f64([math.sqrt(2 * 1 / 2)]))
    assert not policy_weights(f64([0.0]).requires_grad_(), f64([0.0]), [1]).requires_grad


def test_imitation_loss_by_hand():
    assert imitation_loss(f64([-6.0, -1.0]), f64([3.0, 4.0])).tolist() == [2.0, 0.25]


def test_odds_ratio_by_hand():
    # P = ¾ and ⅕: odds 3 and ¼, their ratio 12, σ(log 12) = 12/13.
    chosen, rejected = f64(LOG(3 / 4)).requires_grad_(), f64(LOG(1 / 5)).requires_grad_()
    loss = odds_ratio_loss(chosen, rejected)
    assert loss.item() == pytest.approx(-LOG(12 / 13))
    loss.backward()  # d log odds / d log P = 1/(1 − P) = 4 and 5/4; the loss's own slope is ∓ 1/13
    assert chosen.grad.item() == pytest.approx(-4 / 13)
    assert rejected.grad.item() == pytest.approx(5 / 4 / 13)


@settings(deadline=None)
@given(st.floats(-60, -1e-6))
def test_log_odds_against_more_digits(logprob):
    """float32 against the same in Python's floats, from P = 1e-26 to 0.999999."""
    made = log_odds(torch.tensor(logprob, dtype=torch.float32)).item()
    exact = torch.tensor(logprob, dtype=torch.float32).item()
    expected = exact - math.log(-math.expm1(exact))
    assert made == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_log_odds_are_finite_at_the_ends():
    logprob = torch.tensor([0.0, -1e-30, -1e-7, -LOG(2), -200.0], requires_grad=True)
    odds = log_odds(logprob)
    assert odds.isfinite().all()
    odds.sum().backward()
    assert logprob.grad.isfinite().all()


def test_simpo_by_hand():
    # Means −1 and −1 − log 3: β m = 2 log 3, and γ = log 3 leaves log 3: −log ¾.
    chosen, rejected = f64(-1.0).requires_grad_(), f64(-1 - LOG(3)).requires_grad_()
    loss = simpo_loss(chosen, rejected, 2.0, LOG(3))
    assert loss.item() == pytest.approx(-LOG(3 / 4))
    loss.backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-2 / 4, 2 / 4))
    smooth = simpo_loss(chosen, rejected, 2.0, LOG(3), label_smoothing=0.1)
    assert smooth.item() == pytest.approx(-0.9 * LOG(3 / 4) - 0.1 * LOG(1 / 4))


def test_alphapo_by_hand():
    # α = 1: r = 1 − 1/p, of ½ and ¼: −1 and −3. β = 1, γ = 2 leaves 0.
    loss = simpo_loss(f64(LOG(1 / 2)), f64(LOG(1 / 4)), 1.0, 2.0, alpha=1.0)
    assert loss.item() == pytest.approx(LOG(2))


def test_simpo_without_margin_and_shape_is_dpo_of_averages():
    chosen, rejected = f64([-0.3, -2.0]), f64([-1.0, -0.5])
    torch.testing.assert_close(simpo_loss(chosen, rejected, 2.0, 0.0), sigmoid_loss(chosen - rejected, 2.0))


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: imitation_loss(a, b),
        lambda a, b: odds_ratio_loss(a - 1, b - 1),
        lambda a, b: simpo_loss(a, b, 1.0, 0.0),
        lambda a, b: policy_weights(a, b, [3]),
    ],
)
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(DataError, match="shapes differ"):
        loss(torch.zeros(3), torch.zeros(1))
