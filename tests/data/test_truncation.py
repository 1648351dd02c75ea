import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.data.truncation import truncate, truncate_pair
from etude.types import Episode, Preference, Segment


def episode(prompt: int, answer: int, first: int = 100) -> Episode:
    """Tokens 0, 1, … of a prompt, in two segments, and `first`, … of an answer."""
    ids = list(range(prompt))
    start = [Segment("prompt", "", ids[:2]), Segment("environment", "", ids[2:])]
    return Episode(segments=[*start, Segment("model", "", list(range(first, first + answer)), target=True)])


@pytest.mark.parametrize(
    ("max_length", "mode", "expected"),
    [
        (None, "keep_start", [0, 1, 2, 3, 100, 101, 102]),
        (7, "keep_end", [0, 1, 2, 3, 100, 101, 102]),
        (6, "keep_start", [0, 1, 2, 3, 100, 101]),
        (2, "keep_start", [0, 1]),
        (6, "keep_end", [1, 2, 3, 100, 101, 102]),
        (4, "keep_end", [3, 100, 101, 102]),
        (3, "keep_end", [3, 100, 101]),  # the answer is predicted from something
    ],
)
def test_an_episode(max_length, mode, expected):
    whole = episode(4, 3)
    cut = truncate(whole, max_length, mode)
    assert cut.token_ids == expected
    assert cut.target == [token >= 100 for token in expected]
    assert len(whole) == 7, "the episode itself stays"


def test_a_pair_loses_the_same_of_its_prompt():
    pair = Preference(episode(4, 2), episode(4, 4, first=200), margin=1.0)
    cut = truncate_pair(pair, 6, "keep_end")
    assert cut.chosen.token_ids == [2, 3, 100, 101]
    assert cut.rejected.token_ids == [2, 3, 200, 201, 202, 203]
    assert cut.margin == 1.0
    start = truncate_pair(pair, 5)
    assert (start.chosen.token_ids, start.rejected.token_ids) == ([0, 1, 2, 3, 100], [0, 1, 2, 3, 200])
    assert truncate_pair(pair, 8, "keep_end") is pair


@given(
    *(st.integers(0, 6) for _ in range(3)), st.integers(1, 12), st.sampled_from(["keep_start", "keep_end"])
)
def test_pairs_stay_pairs(prompt, chosen, rejected, max_length, mode):
    pair = Preference(episode(prompt, chosen), episode(prompt, rejected, first=200))
    cut = truncate_pair(pair, max_length, mode)
    kept = []
    for before, after in ((pair.chosen, cut.chosen), (pair.rejected, cut.rejected)):
        assert len(after) <= max_length
        assert "".join(map(chr, after.token_ids)) in "".join(map(chr, before.token_ids)), "one stretch of it"
        kept.append([token for token in after.token_ids if token < 100])
    shorter, longer = sorted(kept, key=len)
    assert longer[: len(shorter)] == shorter, "the prompts begin alike"
    if prompt and max(len(pair.chosen), len(pair.rejected)) > max_length and mode == "keep_end":
        assert shorter == longer != [], "and are equal, and not empty"
