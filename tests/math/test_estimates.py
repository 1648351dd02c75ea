"""pass@k and distinct-n by hand and by counting."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import ConfigError
from etude.math.estimates import distinct, pass_at_k


def test_pass_at_k_by_hand():
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - (3 * 2) / (5 * 4))
    assert pass_at_k(4, 0, 3) == 0
    assert pass_at_k(4, 2, 3) == 1  # three of four can't miss both


@given(st.integers(1, 9), st.data())
def test_it_is_the_share_of_subsets_with_a_success(samples, data):
    successes = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    outcomes = [True] * successes + [False] * (samples - successes)
    subsets = [any(chosen) for chosen in combinations(outcomes, k)]
    assert pass_at_k(samples, successes, k) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(("samples", "successes", "k"), [(4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 1)])
def test_what_has_no_pass_at_k(samples, successes, k):
    with pytest.raises(ConfigError, match=r"expected 1 <= k <= samples"):
        pass_at_k(samples, successes, k)


TASKS = [["abab", "ab"], ["ba"], [], ["cc"]]


def test_distinct_n_by_hand():
    """Bigrams: ab ba ab ab | ba | | cc. Three different of six; without the first task two of two."""
    found = distinct(TASKS, 2)
    assert found.value == 3 / 6
    assert found.without_N.tolist() == [2 / 2, 3 / 5, 3 / 6, 2 / 5]
    assert distinct(TASKS, 1).value == 3 / 10
    assert math.isnan(distinct(TASKS, 5).value)
    with pytest.raises(ConfigError, match="expected n >= 1"):
        distinct(TASKS, 0)


@given(st.lists(st.lists(st.text("ab", max_size=6), max_size=3), min_size=1, max_size=6), st.integers(1, 3))
def test_leaving_a_task_out_is_measuring_the_others(tasks, n):
    found = distinct(tasks, n)
    others = [distinct(tasks[:i] + tasks[i + 1 :], n).value for i in range(len(tasks))]
    torch.testing.assert_close(found.without_N, torch.tensor(others).double(), equal_nan=True)
