"""Intervals against published numbers, numbers worked by hand, and how often they hold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import ConfigError
from etude.math.intervals import (
    bootstrap,
    independent_trials,
    jackknife,
    normal_quantile,
    percentile_interval,
    rate_difference,
    rate_interval,
    ratio,
    wilson,
)

F64 = torch.float64


def column(*values):
    return torch.tensor(values, dtype=F64)


def paired(both, first, second, neither):
    """Two sides that played each task once: how many tasks both solved, only one of them, or neither."""
    sides = [[1.0] * both + [1.0] * first + [0.0] * second + [0.0] * neither]
    sides.append([1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither)
    return [(column(*side), torch.ones(len(side), dtype=F64)) for side in sides]


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    # Newcombe 1998 ("Two-sided confidence intervals for the single proportion"), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval(hits, trials, low, high):
    found = wilson(hits / trials, trials)
    assert (found.value, found.low, found.high) == (
        hits / trials,
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )


def test_a_greater_confidence_is_wider():
    assert normal_quantile(0.95) == pytest.approx(1.959964)
    half, most = wilson(0.3, 50, 0.5), wilson(0.3, 50, 0.99)
    assert most.low < half.low < 0.3 < half.high < most.high
    for wrong in (0.0, 1.0, 95):
        with pytest.raises(ConfigError, match="expected between 0 and 1"):
            wilson(0.3, 50, wrong)


def test_nothing_was_tried():
    found = rate_interval(column(0, 0), column(0, 0))
    assert all(map(math.isnan, (found.value, found.low, found.high)))


def test_one_trial_per_task_is_worth_one_trial():
    hits = column(1, 0, 0, 1, 1)
    assert independent_trials(hits, torch.ones_like(hits)) == pytest.approx(5)


def test_samples_that_agree_are_worth_no_more_than_their_task():
    """Four samples each: all alike within their task, or just as spread as independent ones."""
    trials = column(4, 4, 4, 4, 4, 4)
    assert independent_trials(column(4, 0, 4, 0, 0, 4), trials) == pytest.approx(6)
    assert independent_trials(column(2, 2, 2, 2, 2, 2), trials) == 24  # no variance over tasks at all
    # p = 1/2; (h − p t)² = 1 for each: Var = 6 / 24², p (1 − p) / Var = 24.
    assert independent_trials(column(1, 3, 1, 3, 1, 3), trials) == pytest.approx(24)
    # (h − p t)² = 4, 4, 0, 0, 0, 0: Var = 8 / 24², 1/4 / Var = 18.
    assert independent_trials(column(0, 4, 2, 2, 2, 2), trials) == pytest.approx(18)
    assert independent_trials(column(4, 4, 4, 4, 4, 4), trials) == 6  # nothing tells them apart


def test_calls_are_counted_by_task():
    """Errors over calls: 3 / 8; residuals 2 − 1.5, 1 − 1.5, 0: Var = 0.5 / 64, p (1 − p) / Var = 30 > 8."""
    assert ratio(column(2, 1, 0), column(4, 4, 0)) == 0.375
    assert independent_trials(column(2, 1, 0), column(4, 4, 0)) == 8
    assert independent_trials(column(2, 1, 0), column(4, 4, 0), most=5) == 5


def test_a_paired_difference():
    """Bentur et al. 2009, as in Fagerland, Lydersen & Laake 2014, table V: −0.507 to −0.026."""
    found = rate_difference(*paired(1, 1, 7, 12))
    assert found.value == pytest.approx(-6 / 21)
    assert (found.low, found.high) == (pytest.approx(-0.507, abs=5e-4), pytest.approx(-0.026, abs=5e-4))
    other_way = rate_difference(*reversed(paired(1, 1, 7, 12)))
    assert (other_way.low, other_way.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_pairs_tell_more_than_sides_and_agreement_leaves_doubt():
    alike, opposed = rate_difference(*paired(30, 10, 0, 20)), rate_difference(*paired(10, 30, 20, 0))
    assert alike.value == opposed.value == pytest.approx(1 / 6)
    assert alike.low > 0 > opposed.low
    same = rate_difference(*paired(20, 0, 0, 20))
    assert same.value == 0
    assert -0.06 < same.low < -0.01
    assert 0.01 < same.high < 0.06


@pytest.mark.parametrize("samples", [1, 4])
def test_intervals_of_rates_hold_as_often_as_they_say(samples):
    """600 evaluations of 60 tasks whose chances differ, second side a little better."""
    generator = torch.Generator().manual_seed(samples)
    alone = paired_ = 0
    for _ in range(600):
        chances = torch.rand(60, generator=generator, dtype=F64)
        trials = torch.full((60,), float(samples), dtype=F64)
        first, second = (
            torch.stack([(torch.rand(60, generator=generator) < c).to(F64) for _ in range(samples)]).sum(0)
            for c in (chances, 0.1 + 0.9 * chances)
        )
        found = rate_interval(first, trials)
        alone += found.low <= 0.5 <= found.high
        difference = rate_difference((second, trials), (first, trials))
        paired_ += difference.low <= 0.05 <= difference.high
    assert 0.925 < alone / 600 < 0.985
    assert 0.925 < paired_ / 600 < 0.99


def test_resampled_means_are_spread_as_the_mean_is():
    """Values 0 … 9, each task once: the mean's deviation is √(8.25 / 10)."""
    values = torch.arange(10, dtype=F64)[:, None]
    draws = bootstrap(values, torch.ones_like(values), resamples=20_000)
    assert draws.shape == (20_000, 1)
    assert float(draws.mean()) == pytest.approx(4.5, abs=0.03)
    assert float(draws.std()) == pytest.approx(math.sqrt(0.825), rel=0.03)
    found = percentile_interval(4.5, draws[:, 0], 10)
    assert found.low == pytest.approx(4.5 - 1.96 * math.sqrt(0.825), abs=0.1)
    assert found.high == pytest.approx(4.5 + 1.96 * math.sqrt(0.825), abs=0.1)


def test_the_same_seed_draws_the_same_tasks_in_however_many_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(30, 2, generator=generator, dtype=F64)
    counts = torch.randint(0, 3, (30, 2), generator=generator).to(F64)
    draws = bootstrap(first, counts, 100)
    shifted = bootstrap(first + 1.5 * counts, counts, 100)
    assert torch.allclose(shifted - draws, torch.full_like(draws, 1.5)), "pairs: the difference has no noise"
    assert not torch.equal(draws, bootstrap(first, counts, 100, seed=1))
    monkeypatch.setattr("etude.math.intervals._CELLS", 70)
    assert torch.allclose(bootstrap(first, counts, 100), draws)


def test_draws_that_count_nothing_are_left_out():
    sums, counts = column(3, 0, 0, 0)[:, None], column(1, 0, 0, 0)[:, None]
    draws = bootstrap(sums, counts, 200)
    assert draws.isnan().any()
    found = percentile_interval(3.0, draws[:, 0], 4)
    assert (found.low, found.high) == (3, 3)
    assert math.isnan(percentile_interval(3.0, draws[:, 0], 1).low), "one task says nothing of others"


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_the_jackknife_of_a_mean_is_its_standard_error(values):
    x = torch.tensor(values, dtype=F64)
    without = (x.sum() - x) / (len(x) - 1)
    found = jackknife(float(x.mean()), without)
    error = float(x.std() / math.sqrt(len(x)))
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-6, abs=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_one_task_has_no_jackknife():
    assert math.isnan(jackknife(0.5, column(0.5)).low)
