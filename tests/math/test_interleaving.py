"""Turns by weight: each one's share of any stretch, and no turn lost or taken twice."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.math.interleaving import turn

weights_and_offsets = st.lists(
    st.tuples(st.floats(0.01, 100), st.floats(0, 0.999)), min_size=1, max_size=6
).map(lambda pairs: tuple(map(list, zip(*pairs, strict=True))))


def test_by_hand():
    """Of 3 and 1: due at 0, 4/3, 8/3, 4, … and at 2, 6, …"""
    assert [turn(n, [3.0, 1.0], [0.0, 0.5])[0] for n in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert [turn(n, [3.0, 1.0], [0.0, 0.5])[1] for n in range(8)] == [0, 1, 0, 2, 3, 4, 1, 5]


@given(weights_and_offsets, st.sampled_from([0, 1, 1000, 2**30]))
def test_nothing_is_left_out_and_shares_are_kept(both, first):
    weights, offsets = both
    count = 300
    turns = [turn(n, weights, offsets) for n in range(first, first + count)]
    counts = Counter(which for which, _ in turns)
    for which, weight in enumerate(weights):
        own = [before for one, before in turns if one == which]
        if own:
            assert own == list(range(own[0], own[0] + len(own)))
        share = count * weight / sum(weights)
        assert abs(counts[which] - share) < 2 + len(weights)


@given(weights_and_offsets)
def test_from_the_beginning(both):
    for which in range(len(both[0])):
        firsts = [before for n in range(50) for one, before in [turn(n, *both)] if one == which]
        assert firsts == list(range(len(firsts)))


@pytest.mark.parametrize("sizes", [[1], [7, 5], [100, 3, 1]])
def test_in_proportion_to_sizes_an_epoch_is_whole(sizes):
    weights, offsets = [float(size) for size in sizes], [0.3 * i for i in range(len(sizes))]
    for epoch in range(3):
        numbers = range(epoch * sum(sizes), (epoch + 1) * sum(sizes))
        counts = Counter(turn(n, weights, offsets)[0] for n in numbers)
        assert [counts[i] for i in range(len(sizes))] == sizes
