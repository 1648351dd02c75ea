import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.data.packing import best_fit
from etude.errors import DataError


def test_by_hand():
    """7 and 5 open a bin each, 4 fits behind the 5 only, 3 fills up the 7, for 2 there is no room."""
    assert best_fit([4, 3, 7, 5, 2], 10) == [[2, 1], [3, 0], [4]]


def test_the_fullest_bin_that_fits_is_chosen():
    # 8 and 7 have 2 and 3 left; 2 belongs to the 8, and the 3 still fits the 7.
    assert best_fit([8, 7, 2, 3], 10) == [[0, 2], [1, 3]]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_every_row_is_in_one_bin_and_bins_are_full(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    fills = [sum(lengths[i] for i in members) for members in bins]
    assert all(0 < fill <= capacity for fill in fills)
    fewest = math.ceil(sum(lengths) / capacity)
    assert len(bins) <= 11 / 9 * max(fewest, 1) + 6 / 9 or sum(sorted(fills)[:2]) > capacity


def test_a_row_that_is_too_long():
    with pytest.raises(DataError, match="a row of 11 tokens doesn't fit into 10"):
        best_fit([3, 11], 10)
