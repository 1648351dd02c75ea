import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import RewardError
from etude.math.running import RunningMoments

BATCHES = st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=6)


def fed(*batches):
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64))
    return moments


def test_two_batches_by_hand():
    moments = RunningMoments()
    # 1, 3: mean 2, unbiased variance (1 + 1)/1 = 2.
    assert moments.update(torch.tensor([1.0, 3.0])) == (2.0, math.sqrt(2))
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, math.sqrt(2))
    # 5, 7, 9: mean 7, variance (4 + 0 + 4)/2 = 4.
    assert moments.update(torch.tensor([5.0, 7.0, 9.0])) == (7.0, 2.0)
    # All of them: mean 25/5 = 5, squares 16 + 4 + 0 + 4 + 16 = 40, variance 40/4 = 10.
    assert (moments.count, moments.mean) == (5, 5.0)
    assert moments.std == pytest.approx(math.sqrt(10))


def test_before_two_scores_the_scale_is_one():
    moments = RunningMoments()
    assert (moments.count, moments.mean, moments.std) == (0, 0.0, 1.0)
    assert moments.update(torch.tensor([4.0])) == (4.0, 0.0)
    assert (moments.count, moments.mean, moments.std) == (1, 4.0, 1.0)
    moments.update(torch.tensor([4.0]))
    assert moments.std == 0.0


@settings(deadline=None)
@given(BATCHES)
def test_batches_are_worth_as_much_as_the_whole(batches):
    moments, everything = fed(*batches), [x for batch in batches for x in batch]
    assert moments.count == len(everything)
    assert moments.mean == pytest.approx(statistics.fmean(everything), abs=1e-9)
    if len(everything) > 1:
        assert moments.std == pytest.approx(statistics.stdev(everything), rel=1e-6, abs=1e-9)


def test_a_large_mean_does_not_swallow_a_small_spread():
    # E[x²] − E[x]² would cancel here; float32 sums would, too.
    moments = fed(*[[1e6 + 0.5, 1e6 - 0.5]] * 500)
    assert moments.mean == pytest.approx(1e6)
    assert moments.std == pytest.approx(0.5 * math.sqrt(1000 / 999), rel=1e-9)


def test_shape_and_dtype_do_not_matter():
    flat, square = RunningMoments(), RunningMoments()
    flat.update(torch.tensor([1.0, 2.0, 3.0, 8.0], requires_grad=True))
    square.update(torch.tensor([[1.0, 2.0], [3.0, 8.0]], dtype=torch.bfloat16))
    assert flat.state_dict() == square.state_dict()


@settings(deadline=None, max_examples=30)
@given(BATCHES, BATCHES)
def test_state_round_trip_through_json(before, after):
    moments, resumed = fed(*before), RunningMoments()
    resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    for batch in after:
        tensor = torch.tensor(batch, dtype=torch.float64)
        assert moments.update(tensor) == resumed.update(tensor)
    assert resumed.state_dict() == moments.state_dict()
    assert (resumed.count, resumed.mean, resumed.std) == (moments.count, moments.mean, moments.std)


def test_errors_leave_the_moments_alone():
    moments = fed([1.0, 3.0])
    before = moments.state_dict()
    for bad, value in ((math.nan, "nan"), (math.inf, "inf")):
        with pytest.raises(RewardError, match=f"score 1 is {value}"):
            moments.update(torch.tensor([0.0, bad]))
    with pytest.raises(RewardError, match="no scores"):
        moments.update(torch.tensor([]))
    assert moments.state_dict() == before
