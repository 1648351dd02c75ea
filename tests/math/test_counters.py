"""Counters: a function of its words, even, and the same in every process."""

import subprocess
import sys

from etude.math.counters import fraction, mix, word_of


def test_order_and_number_of_words_count():
    assert mix(1, 2) != mix(2, 1)
    assert mix(0) != mix(0, 0) != mix()
    assert 0 <= mix(-1, 2**70) < 2**64


def test_fractions_are_even():
    values = [fraction(seed, place) for seed in range(40) for place in range(40)]
    assert len(set(values)) == 1600
    assert all(0 <= value < 1 for value in values)
    for decile in range(10):
        assert 110 < sum(decile <= 10 * value < decile + 1 for value in values) < 210


def test_a_text_has_the_same_word_in_another_process():
    code = "from etude.math.counters import word_of; print(word_of('738*46 \\ud800 é'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) == word_of("738*46 \ud800 é") != word_of("738*46")
