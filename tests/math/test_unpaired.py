import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import DataError
from etude.math.preference import apo_zero_loss
from etude.math.unpaired import kto_baseline, kto_loss


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_kto_by_hand():
    # β = ½, z = 1. Good with h = 1 + 2 log 3: σ(log 3) = ¾, loss ¼, twice. Bad with h = 1 − 2 log 4: 1 − ⅘,
    # thrice.
    log_ratio = f64([1 + 2 * math.log(3), 1 - 2 * math.log(4)]).requires_grad_()
    losses = kto_loss(
        log_ratio, torch.tensor([True, False]), 1.0, 0.5, desirable_weight=2.0, undesirable_weight=3.0
    )
    torch.testing.assert_close(losses.detach(), f64([2 / 4, 3 / 5]))
    losses.sum().backward()  # −λ β σ (1 − σ) and +
    torch.testing.assert_close(log_ratio.grad, f64([-2 * 0.5 * 3 / 16, 3 * 0.5 * 4 / 25]))


@settings(deadline=None)
@given(st.floats(-20, 20), st.booleans(), st.floats(0, 5), st.floats(0.05, 2))
def test_kto_against_plain_python(h, good, z, beta):
    value = 1 / (1 + math.exp(-beta * (h - z if good else z - h)))
    loss = kto_loss(f64([h]), torch.tensor([good]), f64(z), beta)
    assert loss.item() == pytest.approx(1 - value, abs=1e-12)


def test_the_baseline_is_the_mean_over_other_prompts_and_never_negative():
    assert kto_baseline(f64([1.0, 2.0, -0.5])).item() == pytest.approx(2.5 / 3)
    assert kto_baseline(f64([-1.0, 0.5])).item() == 0.0
    log_ratio = f64([1.0]).requires_grad_()
    assert not kto_baseline(log_ratio).requires_grad


def test_without_a_baseline_it_is_apo_zero_in_two_parts():
    chosen, rejected = f64([0.3, 2.0]), f64([-1.0, 0.5])
    good, bad = torch.ones(2), torch.zeros(2)
    parts = kto_loss(chosen, good, 0.0, 0.2) + kto_loss(rejected, bad, 0.0, 0.2)
    torch.testing.assert_close(parts, apo_zero_loss(chosen, rejected, 0.2))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(DataError, match="shapes differ"):
        kto_loss(torch.zeros(3), torch.ones(1), 0.0, 0.1)
