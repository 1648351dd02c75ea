import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.data.collate import IGNORED, collate_supervised, supervised_labels
from etude.types import Episode, Segment


def made_of(*parts: tuple[list[int], bool]) -> Episode:
    return Episode(segments=[Segment("model", "", ids, target=target) for ids, target in parts])


def test_padding_by_hand():
    batch = collate_supervised([made_of(([5, 6], False), ([7], True)), made_of(([8], True))], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_lengths_are_rounded_up():
    assert collate_supervised([made_of(([1] * 9, True))], 0, pad_to_multiple_of=8)["labels"].shape == (1, 16)
    assert collate_supervised([made_of(([1] * 8, True))], 0, pad_to_multiple_of=8)["labels"].shape == (1, 8)


def test_truncation_is_said():
    long, short = made_of(([1, 2], False), ([3, 4], True)), made_of(([5], True))
    with pytest.warns(UserWarning, match="longer than max_length=3 lose their end"):
        batch = collate_supervised([long, short], 0, max_length=3)
    assert batch["labels"].tolist() == [[-100, -100, 3], [5, -100, -100]]
    assert collate_supervised([long], 0, max_length=4)["input_ids"].tolist() == [[1, 2, 3, 4]]


runs = st.lists(st.tuples(st.lists(st.integers(0, 50), max_size=5), st.booleans()), min_size=1, max_size=4)


@given(st.lists(runs, min_size=1, max_size=5), st.none() | st.integers(1, 8))
def test_nothing_is_lost_and_padding_is_never_a_target(parts, multiple):
    episodes = [made_of(*part) for part in parts]
    batch = collate_supervised(episodes, 0, pad_to_multiple_of=multiple)
    for row, episode in enumerate(episodes):
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == episode.token_ids
        assert batch["labels"][row][kept].tolist() == supervised_labels(episode)
        assert (batch["labels"][row][~kept] == IGNORED).all()
