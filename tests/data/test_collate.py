from hypothesis import given
from hypothesis import strategies as st

from etude.data.collate import IGNORED, pack, supervised_labels
from etude.types import Episode, Segment

TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


def made_of(*parts: tuple[list[int], bool]) -> Episode:
    return Episode(task={}, segments=[Segment("prompt", "", ids, target=target) for ids, target in parts])


def test_labels_are_the_targets():
    assert supervised_labels(made_of(([5, 6], False), ([7], True))) == [IGNORED, IGNORED, 7]


def test_rows_by_hand():
    batch = pack([[5, 6, 7], [8, 9]], [[IGNORED, 6, 7], [8, 9]])
    assert batch["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert batch["lengths"] == [3, 2]
    assert batch["states"].tolist() == [0, 1, 3]  # the first token of a row has nothing before it
    assert batch["targets"].tolist() == [6, 7, 9]
    assert batch["counts"] == [2, 1]


def test_what_a_decoder_behind_an_encoder_says():
    batch = pack([[5, 6], [7]], [[5, 6], [7]], sources=[[1], [2, 3]])
    assert batch["states"].tolist() == [0, 1, 2]
    assert batch["targets"].tolist() == [5, 6, 7]
    assert (batch["source_ids"].tolist(), batch["source_lengths"]) == ([1, 2, 3], [1, 2])


@given(TOKENS, TOKENS, TOKENS)
def test_a_shared_beginning_lies_there_once(prompt, one, other):
    prompt = prompt * 20  # long enough to be worth it
    rows = [[*prompt, *one], [*prompt, *other]]
    labels = [[IGNORED] * len(prompt) + row[len(prompt) :] for row in rows]
    apart, shared = pack(rows, labels), pack(rows, labels, share=True)
    assert shared["targets"].tolist() == apart["targets"].tolist() == [*one, *other]
    assert shared["counts"] == apart["counts"] == [len(one), len(other)]
    assert len(shared["input_ids"]) <= len(apart["input_ids"]) - len(prompt)
