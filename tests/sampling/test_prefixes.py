"""Shared prefixes, found."""

from hypothesis import given
from hypothesis import strategies as st

from etude.sampling.prefixes import BLOCK, Prefixes


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=6),
    st.lists(st.integers(0, 1), max_size=5),
    st.integers(0, 5),
)
def test_the_longest_is_found(endings, ending, removed):
    """Sequences of a few blocks that differ in one of them: the answer is that of comparing with all."""
    prefixes = Prefixes()
    sequences = {}
    for name, blocks in enumerate(endings):
        sequences[name] = [token for block in blocks for token in [block] * BLOCK]
        prefixes.add(name, sequences[name])
    if removed in sequences:
        prefixes.remove(removed)
        del sequences[removed]
    tokens = [token for block in ending for token in [block] * BLOCK] + [1]
    expected = max((common(s, tokens[:-1]) for s in sequences.values()), default=0)
    found = prefixes.longest(tokens)
    if expected < BLOCK:
        assert found is None
    else:
        holder, length = found
        assert length == common(sequences[holder], tokens[:-1])
        assert length // BLOCK == expected // BLOCK


def test_the_last_token_is_left_to_be_fed():
    prefixes = Prefixes()
    tokens = list(range(3 * BLOCK))
    prefixes.add("a", tokens)
    assert prefixes.longest(tokens) == ("a", 3 * BLOCK - 1)
    assert prefixes.longest([*tokens, 7, 8]) == ("a", 3 * BLOCK)
    assert prefixes.longest([*tokens[: BLOCK + 5], 99]) == ("a", BLOCK + 5)
    assert prefixes.longest(tokens[: BLOCK - 1]) is None
    prefixes.remove("a")
    prefixes.remove("a")
    assert prefixes.longest(tokens) is None
    assert not prefixes._holders
