import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import DataError
from etude.math.masked import masked_mean, masked_var, masked_whiten, require_same_shape

NAN = math.nan


@st.composite
def values_and_mask(draw):
    values = draw(st.lists(st.floats(-100, 100), min_size=1, max_size=12))
    mask = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)).filter(any))
    return values, mask


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_mean_by_hand():
    values_BT = f64([[1.0, NAN, 3.0], [5.0, 6.0, NAN]])
    mask_BT = torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert masked_mean(values_BT, mask_BT).item() == (1 + 3 + 5 + 6) / 4
    assert masked_mean(values_BT, mask_BT, dim=1).tolist() == [(1 + 3) / 2, (5 + 6) / 2]
    assert masked_mean(values_BT[:, [0, 2]], mask_BT[:, [0, 2]], dim=0).tolist() == [(1 + 5) / 2, 3.0]


def test_mean_of_flags_is_a_fraction():
    flags = torch.tensor([True, False, True, True])
    assert masked_mean(flags, torch.tensor([True, True, True, False])).item() == pytest.approx(2 / 3)


def test_gradient_reaches_the_selected_values_only():
    values = f64([1.0, NAN, 3.0]).requires_grad_()
    masked_mean(values, torch.tensor([1, 0, 1])).backward()
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_variance_by_hand():
    values, mask = f64([1.0, 2.0, NAN, 6.0]), torch.tensor([1, 1, 0, 1])
    # mean 3, squares 4 + 1 + 9 = 14: 14/2 unbiased, 14/3 biased.
    assert masked_var(values, mask).item() == pytest.approx(7.0)
    assert masked_var(values, mask, unbiased=False).item() == pytest.approx(14 / 3)


def test_variance_of_one_value_is_zero():
    values, mask = f64([5.0, NAN]), torch.tensor([1, 0])
    assert masked_var(values, mask).item() == masked_var(values, mask, unbiased=False).item() == 0.0


@settings(deadline=None)
@given(values_and_mask())
def test_mean_and_variance_against_statistics(case):
    values, mask = case
    chosen = [v for v, m in zip(values, mask, strict=True) if m]
    arguments = f64(values), torch.tensor(mask)
    assert masked_mean(*arguments).item() == pytest.approx(statistics.fmean(chosen), abs=1e-9)
    biased = masked_var(*arguments, unbiased=False).item()
    assert biased == pytest.approx(statistics.pvariance(chosen), abs=1e-7)
    if len(chosen) > 1:
        assert masked_var(*arguments).item() == pytest.approx(statistics.variance(chosen), abs=1e-7)


def test_whiten_by_hand():
    values, mask = f64([1.0, 3.0, NAN, 5.0]), torch.tensor([1, 1, 0, 1])
    # mean 3, unbiased variance (4 + 0 + 4)/2 = 4, standard deviation 2.
    torch.testing.assert_close(masked_whiten(values, mask), f64([-1.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(masked_whiten(values, mask, shift_mean=False), f64([2.0, 3.0, 0.0, 4.0]))


@settings(deadline=None)
@given(values_and_mask())
def test_whitened_values_have_mean_zero_and_variance_one(case):
    values, mask = f64(case[0]), torch.tensor(case[1])
    whitened = masked_whiten(values, mask)
    assert masked_mean(whitened, mask).item() == pytest.approx(0.0, abs=1e-6)
    if masked_var(values, mask) > 1e-3:  # so that the 1e-8 under the root does not show
        assert masked_var(whitened, mask).item() == pytest.approx(1.0, rel=1e-4)
    assert (whitened[~mask] == 0).all()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_values_are_shifted_only(count):
    # The mean of three float32 1000.1 is off by a rounding: over 1e-4 that would be an advantage of .49.
    values, mask = torch.full((count,), 1000.1), torch.ones(count)
    assert masked_whiten(values, mask).tolist() == [0.0] * count
    assert masked_whiten(values, mask, shift_mean=False).tolist() == values.tolist()


def test_a_mask_that_selects_nothing_is_an_error():
    values_BT, mask_BT = torch.ones(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])
    nothing = torch.zeros(2, 3)
    for function in (masked_mean, masked_var, masked_whiten):
        with pytest.raises(DataError, match="selects nothing"):
            function(values_BT, nothing)
    with pytest.raises(DataError, match="1 of 2 slices along dimension 1"):
        masked_mean(values_BT, mask_BT, dim=1)


def test_shapes_must_be_equal():
    with pytest.raises(DataError, match=r"values \(2, 2\), mask \(2,\)"):
        masked_mean(torch.ones(2, 2), torch.ones(2))
    require_same_shape(a=torch.ones(2), b=torch.zeros(2))
