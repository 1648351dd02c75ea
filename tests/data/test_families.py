"""Which sequences begin alike, the passes that they are put in, and where their tokens lie."""

from itertools import pairwise

import hypothesis.strategies as st
import torch
from hypothesis import given

from etude.data.families import Layout, each_alone, find_families, into_passes

# Of few different tokens, so that many begin alike.
SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), max_size=9)


def tensors(sequences):
    return [torch.tensor(sequence) for sequence in sequences]


def computed(sequences, families):
    """Tokens computed: each beginning once, and what follows it."""
    return sum(f.length + sum(len(sequences[i]) - f.length for i in f.members) for f in families)


def runs_of(items):
    """All ways to cut a list into runs."""
    for cuts in range(2 ** max(len(items) - 1, 0)):
        ends = [i + 1 for i in range(len(items)) if cuts >> i & 1 or i == len(items) - 1]
        yield [items[start:end] for start, end in pairwise([0, *ends])]


def common(sequences):
    length = 0
    if len(sequences) == 1:
        return len(sequences[0])
    while all(len(s) > length for s in sequences) and len({s[length] for s in sequences}) == 1:
        length += 1
    return length


def test_groups_are_preferred_to_their_preamble_where_they_save_more():
    preamble = [9] * 5
    prompts = [[*preamble, 1, 1, 1, 1], [*preamble, 2, 2, 2, 2]]
    grouped = tensors([*prompts[i % 2], 10 + i] for i in range(6))
    families = find_families(grouped, least=3)
    assert sorted((sorted(f.members), f.length) for f in families) == [([0, 2, 4], 9), ([1, 3, 5], 9)]
    single = tensors([*prompts[i], 10 + i] for i in range(2))
    assert [(sorted(f.members), f.length) for f in find_families(single, least=3)] == [([0, 1], 5)]
    assert [f.length for f in find_families(single, least=6)] == [10, 10]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=9), st.integers(1, 4))
def test_no_cutting_of_the_sorted_sequences_saves_more(sequences, least):
    families = find_families(tensors(sequences), least)
    assert sorted(i for f in families for i in f.members) == list(range(len(sequences)))
    for family in families:
        beginnings = {tuple(sequences[i][: family.length]) for i in family.members}
        assert len(beginnings) == 1
        assert len(beginnings.pop()) == family.length
        assert len(family.members) == 1 or family.length >= least
    total = sum(map(len, sequences))
    savings = [
        sum((len(run) - 1) * shared for run in runs if (shared := common(run)) >= least)
        for runs in runs_of(sorted(sequences))
    ]
    assert total - computed(sequences, families) == max(savings)


def computed_in(members, sequences, families):
    """Tokens of a pass of `members`: each family's beginning once, and what follows it."""
    inside = [(family.length, [i for i in family.members if i in members]) for family in families]
    return sum(n + sum(len(sequences[i]) - n for i in rows) for n, rows in inside if rows)


@given(SEQUENCES, st.integers(1, 4), st.none() | st.integers(1, 20), st.booleans())
def test_passes_within_their_bounds(sequences, size, limit, share):
    sequences = [[7] * 16 + sequence if i % 2 else sequence for i, sequence in enumerate(sequences)]
    passes = into_passes(tensors(sequences), size, limit, share)
    assert sorted(i for group in passes for i in group) == list(range(len(sequences)))
    tokens = []
    for group in passes:
        layout = Layout.of(tensors(sequences[i] for i in group), share)
        tokens.append(sum(map(len, layout.pieces)))
        assert 0 < len(group) <= size
        assert limit is None or tokens[-1] <= limit or len(group) == 1
    if not share:
        assert [i for group in passes for i in group] == list(range(len(sequences)))
    # Counted by what all sequences have in common: those of a single pass may have more.
    families = find_families(tensors(sequences)) if share else each_alone(tensors(sequences))
    for group, following in pairwise(passes):
        wider = computed_in([*group, following[0]], sequences, families)
        assert len(group) == size or (limit is not None and wider > limit), "no pass ends early"


def test_those_that_begin_alike_meet_in_a_pass():
    prompts = [list(range(20)), list(range(30, 50))]
    shuffled = tensors([*prompts[i % 2], 60 + i] for i in range(8))
    assert into_passes(shuffled, 4, share=False) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    passes = into_passes(shuffled, 4)
    assert sorted(map(sorted, passes)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # 24 tokens hold a prompt and four answers; 23, three of them, and the fourth begins a pass.
    assert [len(group) for group in into_passes(shuffled, 8, limit=24)] == [4, 4]
    assert [len(group) for group in into_passes(shuffled, 8, limit=23)] == [3, 1, 3, 1]


def test_a_layout_by_hand():
    prompt = list(range(16))
    sequences = tensors([[50, 51], [*prompt, 60, 61], [*prompt, 70], prompt])
    layout = Layout.of(sequences, share=True)
    pieces = [piece.tolist() for piece in layout.pieces]
    assert sorted(pieces[:2], key=len) == [[50, 51], prompt]
    assert sorted(pieces[2:], key=len) == [[70], [60, 61]]
    beginning = pieces.index(prompt)
    assert layout.prefixes == [None, None, beginning, beginning]


@given(SEQUENCES, st.booleans())
def test_every_token_is_where_the_layout_says(sequences, share):
    sequences = tensors([7] * 16 + sequence for sequence in sequences)
    layout = Layout.of(sequences, share)
    flat = torch.cat(layout.pieces) if layout.pieces else torch.empty(0)
    for i, sequence in enumerate(sequences):
        assert torch.equal(flat[layout.flat(i, torch.arange(len(sequence)))], sequence)


def test_passes_of_sources_hold_what_has_the_same_one():
    """What answers begin with is not shared, and a source that only begins like another is another."""
    source, longer, short = [8] * 20, [*[8] * 20, 9], [5]
    sources = tensors([source, short, longer, source, source, short])
    answers = tensors([[2, 3, 4], [2, 3], [2], [2, 3, 4], [2, 3, 4], [2, 3]])
    assert into_passes(answers, 6, sources=sources) == [[0, 3, 4, 1, 5, 2]]
    # 20 for the source and 3 for each answer; a source counts anew in each pass.
    assert into_passes(answers, 6, 26, sources=sources) == [[0, 3], [4, 1], [5, 2]]
    assert into_passes(answers, 6, 25, sources=sources) == [[0], [3], [4], [1, 5], [2]]
    assert into_passes(answers, 2, sources=sources) == [[0, 3], [4, 1], [5, 2]]
    assert into_passes(answers, 6, 30, share=False, sources=sources) == [[0, 1], [2], [3], [4, 5]]
    assert into_passes([], 4, sources=[]) == []


@given(SEQUENCES, st.integers(1, 4), st.none() | st.integers(1, 20))
def test_passes_of_sources_within_their_bounds(answers, size, limit):
    sources = [[i % 3] * (1 + i % 3) for i in range(len(answers))]
    passes = into_passes(tensors(answers), size, limit, sources=tensors(sources))
    assert sorted(i for group in passes for i in group) == list(range(len(answers)))
    for group in passes:
        read = {tuple(sources[i]) for i in group}
        tokens = sum(map(len, read)) + sum(len(answers[i]) for i in group)
        assert len(group) <= size
        assert limit is None or tokens <= limit or len(group) == 1
    order = [tuple(sources[i]) for group in passes for i in group]
    assert sum(a != b for a, b in pairwise(order)) == max(len(set(order)) - 1, 0), "the same lie together"
