"""Random lengths."""

import numpy as np
import pytest

from etude.errors import ConfigError
from etude.sampling.lengths import LengthRange, LengthSampler


def test_the_end_is_not_included():
    np.random.seed(0)
    lengths = LengthSampler(2, 5)
    assert {lengths() for _ in range(100)} == {2, 3, 4}


@pytest.mark.parametrize("ends", [(3, 3), (5, 2), (-1, 4)])
def test_an_empty_range(ends):
    with pytest.raises(ConfigError, match="min_value < max_value"):
        LengthSampler(*ends)


def test_a_range_draws_from_counters():
    lengths = LengthRange.of((3, 7), "length")
    drawn = [lengths.draw(5, episode) for episode in range(400)]
    assert set(drawn) == {3, 4, 5, 6}
    assert min(drawn.count(length) for length in set(drawn)) > 70
    np.random.seed(1)
    assert [LengthRange.of(LengthSampler(3, 7), "length").draw(5, i) for i in range(400)] == drawn
    assert [lengths.draw(6, i) for i in range(400)] != drawn
    assert {LengthRange.of(4, "length").draw(5, i) for i in range(20)} == {4}


@pytest.mark.parametrize(
    "given", [0, -1, True, (3, 3), (0, 3), (2, 3, 4), (2.0, 5), "ab", LengthSampler(0, 4), 2.5]
)
def test_no_range(given):
    with pytest.raises(ConfigError, match=r"prompt_tokens is .*; expected a length of at least 1, or two"):
        LengthRange.of(given, "prompt_tokens")
