import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import DataError
from etude.math.calibration import Bins, brier, expected_calibration_error, reliability_bins


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_bins_by_hand():
    # Confidences .91, .95, .65, .75, of which only the first two were right; .5 is undecided.
    probabilities, outcomes = f64([0.91, 0.05, 0.65, 0.25, 0.5]), torch.tensor([1, 0, 0, 1, 1])
    bins = reliability_bins(probabilities, outcomes, bins=5)
    assert bins.counts.tolist() == [1, 1, 1, 0, 2]
    torch.testing.assert_close(bins.confidence, f64([0.5, 0.65, 0.75, 0, 1.86]))
    assert bins.right.tolist() == [0.5, 0, 0, 0, 2]
    # |.5 − .5| + |0 − .65| + |0 − .75| + |2 − 1.86|, over 5 choices.
    torch.testing.assert_close(expected_calibration_error(bins), f64(1.54 / 5))


def test_brier_by_hand():
    scores = brier(f64([0.75, 0.25, 1.0]), torch.tensor([1, 1, 0]))
    assert scores.tolist() == [0.0625, 0.5625, 1.0]


PROBABILITIES = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30)


@given(PROBABILITIES, st.integers(0, 30), st.integers(1, 12))
def test_bins_of_parts_add_up(rows, cut, count):
    probabilities, outcomes = f64([p for p, _ in rows]), torch.tensor([y for _, y in rows])
    whole = reliability_bins(probabilities, outcomes, count)
    parts = [
        reliability_bins(probabilities[part], outcomes[part], count)
        for part in (slice(0, cut), slice(cut, None))
    ]
    summed = Bins(*(sum(values) for values in zip(*parts, strict=True)))
    for ours, theirs in zip(summed, whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert whole.counts.sum() == len(rows)


@given(PROBABILITIES)
def test_the_order_of_the_two_makes_no_difference(rows):
    probabilities, outcomes = f64([p for p, _ in rows]), torch.tensor([y for _, y in rows])
    one, other = (
        expected_calibration_error(reliability_bins(p, y))
        for p, y in ((probabilities, outcomes), (1 - probabilities, ~outcomes))
    )
    # A confidence on the edge of a bin may round to either side of it.
    edges = ((probabilities - 0.5).abs() * 20 % 1).minimum(1 - (probabilities - 0.5).abs() * 20 % 1)
    if (edges > 1e-9).all():
        torch.testing.assert_close(one, other)


def test_calibrated_probabilities_have_no_error():
    """Of ten choices with a confidence of .8, eight were right."""
    bins = reliability_bins(torch.full((10,), 0.8), torch.tensor([1] * 8 + [0] * 2))
    torch.testing.assert_close(expected_calibration_error(bins), f64(0.0), atol=1e-7, rtol=0)


def test_nothing_has_no_calibration():
    with pytest.raises(DataError, match="no choices"):
        expected_calibration_error(reliability_bins(torch.zeros(0), torch.zeros(0)))
