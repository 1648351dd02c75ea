"""Metrics of summaries: numbers worked by hand, and rouge-score's own."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from etude.errors import ConfigError, RewardError
from etude.rewards.summary import (
    copy_penalty,
    corpus_rouge,
    length_penalty,
    rouge,
    rouge1,
    rouge2,
    rougeL,
)
from etude.types import Episode, Segment

ANSWERS = ["The cat sat.", "Two dogs were barking at the old cats", "", "nothing of it"]
SUMMARIES = ["the cat lay down", "Dogs bark at an old cat.", "a bird sang", "The house is old."]


def test_rouge_by_hand():
    one, two = rouge1(ANSWERS[:1], SUMMARIES[:1]), rouge2(ANSWERS[:1], SUMMARIES[:1])
    assert one == pytest.approx([2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)])
    assert two == pytest.approx([2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)])
    assert rougeL(["the mat on the cat"], ["the cat"]) == pytest.approx([2 * (2 / 5) * 1 / (2 / 5 + 1)])
    assert rouge(ANSWERS[:1], SUMMARIES[:1]) == pytest.approx([(one[0] + two[0] + one[0]) / 3])


@pytest.mark.parametrize("use_stemmer", [True, False])
def test_it_is_rouge_score_s(use_stemmer):
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=use_stemmer)
    direct = [scorer.score(s, a) for a, s in zip(ANSWERS, SUMMARIES, strict=True)]
    for kind, metric in zip(kinds, (rouge1, rouge2, rougeL), strict=True):
        expected = [scores[kind].fmeasure for scores in direct]
        assert metric(ANSWERS, SUMMARIES, use_stemmer=use_stemmer) == pytest.approx(expected)
        assert corpus_rouge(ANSWERS, SUMMARIES, use_stemmer=use_stemmer)[kind] == pytest.approx(
            100 * sum(expected) / 4
        )
    assert rouge1(ANSWERS, SUMMARIES)[1] > rouge1(ANSWERS, SUMMARIES, use_stemmer=False)[1], "dogs, cats"


def test_references():
    several = [["a dog", "the cat sat"], None, ""]
    assert rouge(["the cat sat"] * 3, several) == [1.0, None, None]
    assert corpus_rouge(["the cat sat"] * 3, several) == {"rouge1": 100, "rouge2": 100, "rougeL": 100}
    assert corpus_rouge(["the cat sat"], [None]) == {}
    with pytest.raises(RewardError, match="summary is 3; expected a text"):
        rouge(["a"], [3])
    with pytest.raises(ConfigError, match=r"kinds is \['rogue1'\]; expected some of rouge1"):
        rouge([], [], kinds=["rogue1"])
    assert rouge(["a\nb c"], ["b c\na"], kinds=["rougeLsum"]) == [1.0]


def test_length_by_hand():
    answers = ["one", "one two three", "one two three four five six", "w " * 20, ""]
    assert length_penalty(answers, words=4) == pytest.approx([-3 / 4, -1 / 4, -2 / 4, -1, -1])
    assert length_penalty(answers, words=(2, 5)) == pytest.approx([-1 / 2, 0, -1 / 5, -1, -1])
    summaries = ["one two", None, ["a b c", "a b c d"], "", "one"]
    assert length_penalty(answers, summaries) == pytest.approx([-1 / 2, None, -2 / 4, None, -1])
    assert length_penalty(answers) == [None] * 5
    assert length_penalty(answers, summaries, words=4)[1] == -1 / 4, "the reference doesn't matter then"


def test_length_in_tokens():
    def episode(sampled):
        turn = Segment("model", "x", list(range(sampled)), policy_version=0)
        return Episode(segments=[Segment("prompt", "?", [1] * 50), turn])

    episodes = [episode(count) for count in (6, 10, 15)]
    assert length_penalty(["x"] * 3, episodes=episodes, tokens=[8, 10]) == pytest.approx([-2 / 8, 0, -5 / 10])


@pytest.mark.parametrize("wanted", [0, (3, 2), (0, 2), (1, 2, 3), "long", 2.5, True])
def test_lengths_that_are_none(wanted):
    with pytest.raises(ConfigError, match=r"the length is .*; expected a number of at least 1"):
        length_penalty([], words=wanted)


def test_length_in_two_ways():
    with pytest.raises(ConfigError, match="give one of them"):
        length_penalty(["a"], words=1, tokens=2)
    with pytest.raises(ConfigError, match="pass episodes, or words"):
        length_penalty(["a"], tokens=2)


def test_copying_by_hand():
    document = "The old cat sat on the mat, and the dog slept."
    copied = "the old cat sat on a chair"  # 4 sequences of 4 words, and the document has 2 of them
    assert copy_penalty([copied], [document]) == [-2 / 4]
    excess = 2 / 4 - 1 / 3
    assert copy_penalty([copied], [document], ["The cat sat on the sofa"]) == pytest.approx([-excess])
    assert copy_penalty([copied], [document], ["and the dog slept"]) == [0.0]
    assert copy_penalty([copied], [document], [["Dogs sleep a lot", "and the dog slept"]]) == [0.0]
    assert copy_penalty(["the dog slept"], [document]) == [0.0], "three words are no four"
    assert copy_penalty(["THE DOG, slept!"], [document], n=2) == [-1.0]
    assert copy_penalty(["a", "a"], [None, ""]) == [None, None]
    with pytest.raises(ConfigError, match="n is 0"):
        copy_penalty([], [], n=0)
