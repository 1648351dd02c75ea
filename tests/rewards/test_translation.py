"""Translation metrics: numbers worked by hand, and sacrebleu's own."""

import math

import pytest
import sacrebleu

from etude.errors import ConfigError, RewardError
from etude.rewards.translation import bleu, chrf, corpus_scores, ter

ANSWERS = ["Das ist ein Haus.", "Ich mag Tee", "", "Es regnet heute sehr stark ."]
TARGETS = ["Das ist ein kleines Haus.", "Ich trinke gern Tee.", "Guten Tag!", "Heute regnet es sehr stark."]


def test_chrf_by_hand():
    # Of "ab" in "abc": letters 2/2 and 2/3, pairs 1/1 and 1/2, nothing longer, and words 0.
    precision, recall = (1 + 1 + 0) / 3, (2 / 3 + 1 / 2 + 0) / 3
    expected = 5 * precision * recall / (4 * precision + recall)
    assert chrf(["ab"], ["abc"]) == pytest.approx([expected])
    precision, recall = (1 + 1) / 2, (2 / 3 + 1 / 2) / 2
    assert chrf(["ab"], ["abc"], word_order=0) == pytest.approx(
        [5 * precision * recall / (4 * precision + recall)]
    )


def test_bleu_by_hand():
    short = math.exp(1 - 4 / 3)  # all that there is of it is right, and a word is missing
    assert bleu(["the cat sat"], ["the cat sat on"]) == pytest.approx([short])
    # 2 of 3 words; none of 2 pairs: 1/2 of one; none of 1 triple: 1/4 of one
    smoothed = (2 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 3)
    assert bleu(["the dog sat"], ["the cat sat"]) == pytest.approx([smoothed])


def test_ter_by_hand():
    assert ter(["the dog sat"], ["the cat sat"]) == pytest.approx([1 - 1 / 3])
    assert ter(["sat the cat"], ["the cat sat"]) == pytest.approx([1 - 1 / 3]), "a shift is one edit"
    assert ter(["a b c d e"], ["x"]) == [0.0], "five edits of one word would be −4"


def test_they_are_sacrebleu_s():
    pairs = list(zip(ANSWERS, TARGETS, strict=True))
    assert chrf(ANSWERS, TARGETS) == pytest.approx(
        [sacrebleu.sentence_chrf(a, [t], word_order=2).score / 100 for a, t in pairs]
    )
    assert bleu(ANSWERS, TARGETS) == pytest.approx(
        [sacrebleu.sentence_bleu(a, [t]).score / 100 for a, t in pairs]
    )
    assert ter(ANSWERS, TARGETS) == pytest.approx(
        [max(1 - sacrebleu.sentence_ter(a, [t]).score / 100, 0) for a, t in pairs]
    )
    assert len({*chrf(ANSWERS, TARGETS)}) == 4
    assert corpus_scores(ANSWERS, TARGETS) == pytest.approx(
        {
            "chrf": sacrebleu.corpus_chrf(ANSWERS, [TARGETS], word_order=2).score,
            "bleu": sacrebleu.corpus_bleu(ANSWERS, [TARGETS]).score,
            "ter": sacrebleu.corpus_ter(ANSWERS, [TARGETS]).score,
        }
    )


@pytest.mark.parametrize("metric", [chrf, bleu, ter])
def test_what_every_metric_does(metric):
    right, spaced, missing, blank, none = metric(
        ["Das ist ein Haus.", " Das ist ein Haus.\n", "Ja", "Ja", "Ja"],
        ["Das ist ein Haus.", "Das ist ein Haus.", None, " ", []],
    )
    assert (right, spaced) == (1.0, 1.0)
    assert (missing, blank, none) == (None, None, None), "there is nothing to compare with"
    several = [["Tee mag ich", "Ich mag Tee"]]
    assert metric(["Ich mag Tee"], several) == [1.0]
    assert metric(["Ich mag Tee"], ["Tee mag ich"])[0] < 1
    with pytest.raises(RewardError, match=r"target is \{'de': 'Ja'\}; expected a text, a list"):
        metric(["Ja"], [{"de": "Ja"}])


def test_a_corpus_with_several_references_or_none():
    several = [["a house", "the house"], ["one dog"], None]
    direct = sacrebleu.corpus_bleu(["the house", "two dogs"], [["a house", "one dog"], ["the house", None]])
    assert corpus_scores(["the house", "two dogs", "nothing"], several)["bleu"] == direct.score
    assert corpus_scores(["the house"], [None]) == {}
    assert corpus_scores([], []) == {}


def test_words_that_no_space_parts():
    assert bleu(["我喜欢茶"], ["我喜欢红茶"])[0] < bleu(["我喜欢茶"], ["我喜欢红茶"], tokenize="zh")[0]
    with pytest.raises(ConfigError, match="tokenize is 'cn'; sacrebleu has"):
        bleu([], [], tokenize="cn")
