"""Where scores of turns and tokens sit, forced beginnings and empty turns included."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.rewards.levels import positions
from etude.types import Episode, Segment


def laid_out(*runs):
    """An episode from (source, tokens) pairs; "sampled" and "forced" are the model's."""
    made = {"sampled": ("model", 0), "forced": ("model", None)}
    sources = [(*made.get(source, (source, None)), count) for source, count in runs]
    return Episode(
        segments=[Segment(source, "", [0] * n, policy_version=version) for source, version, n in sources]
    )


@pytest.mark.parametrize(
    ("runs", "turns", "tokens"),
    [
        ([("prompt", 2), ("sampled", 3), ("tool", 1), ("sampled", 2)], [4, 7], [2, 3, 4, 6, 7]),
        ([("prompt", 2), ("forced", 1), ("sampled", 2), ("tool", 4)], [4], [3, 4]),
        ([("prompt", 2), ("forced", 3), ("tool", 1), ("sampled", 1)], [4, 6], [6]),
        ([("prompt", 2), ("forced", 1), ("sampled", 0), ("tool", 1)], [2], []),
        ([("prompt", 2), ("sampled", 0), ("tool", 1)], [1], []),
        ([("sampled", 0)], [None], []),
        ([("prompt", 2)], [], []),
        ([], [], []),
    ],
    ids=[
        "two turns",
        "forced beginning",
        "forced turn",
        "nothing after it",
        "empty turn",
        "nothing",
        "prompt",
        "none",
    ],
)
def test_positions(runs, turns, tokens):
    assert positions(laid_out(*runs), "turn") == turns
    assert positions(laid_out(*runs), "token") == tokens


runs = st.tuples(st.sampled_from(["sampled", "forced", "tool", "environment"]), st.integers(0, 3))


@given(st.lists(runs, max_size=8))
def test_a_turn_s_position_is_its_last_sampled_token(rest):
    episode = laid_out(("prompt", 2), *rest)
    segments = {id(segment): place for place, segment in enumerate(episode.segments)}
    spans = [(start, end) for start, end, _ in episode.spans()]
    found = positions(episode, "turn")
    assert len(found) == episode.turns
    for turn, position in zip(episode.model_turns, found, strict=True):
        sampled = [t for s in turn if s.sampled for t in range(*spans[segments[id(s)]])]
        whole = [t for s in turn for t in range(*spans[segments[id(s)]])]
        before = spans[segments[id(turn[0])]][0] - 1
        assert position == (sampled or whole or [before])[-1]
