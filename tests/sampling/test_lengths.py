"""Random lengths."""

import numpy as np
import pytest

from etude.errors import ConfigError
from etude.sampling.lengths import LengthSampler


def test_the_end_is_not_included():
    np.random.seed(0)
    lengths = LengthSampler(2, 5)
    assert {lengths() for _ in range(100)} == {2, 3, 4}


@pytest.mark.parametrize("ends", [(3, 3), (5, 2), (-1, 4)])
def test_an_empty_range(ends):
    with pytest.raises(ConfigError, match="min_value < max_value"):
        LengthSampler(*ends)
