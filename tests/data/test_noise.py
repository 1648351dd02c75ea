"""Noise changes what it may and nothing else, as often as it says, and always in the same way."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.data.noise import (
    NUMBERS,
    SHIPPED,
    TAGS,
    CharacterNoise,
    Distraction,
    Injection,
    OwnNoise,
    Paraphrase,
    WordDrop,
    as_noise,
    protected,
)
from etude.errors import ConfigError, DataError

WORDS = st.sampled_from(
    [
        "What",
        "is",
        "738*46+19",
        "(3",
        "+",
        "4)",
        "/",
        "2",
        "v2",
        "the",
        "1,000.50",
        "<call>",
        "straße",
        "мир",
        "二",
    ]
)
TEXTS = st.lists(WORDS, max_size=12).map(" ".join) | st.text(max_size=30)
SEEDS = st.integers(0, 2**64 - 1)
RATES = st.floats(0, 1)


def shown(text, *patterns):
    return "".join(c if kept else "·" for c, kept in zip(text, protected(text, patterns), strict=True))


def spans(text, patterns):
    """The protected texts, in order."""
    kept = zip(text, protected(text, patterns), strict=True)
    return re.findall(r"[^\0]+", "".join(c if keep else "\0" for c, keep in kept))


def test_what_is_protected():
    assert shown("What is 738*46+19?", NUMBERS) == "········738*46+19?"
    assert shown("add (3 + 4) * 2, then stop", NUMBERS) == "····(3 + 4) * 2,··········"
    assert shown("in v2 - the new one", NUMBERS) == "···v2··············"
    assert shown("a <call> [INST] b", TAGS) == "··<call>·[INST]··"
    assert shown("Ann or Bob", "Ann", "B.b") == "Ann····Bob"
    with pytest.raises(ConfigError, match="no regular expression"):
        CharacterNoise(protect=("(",))


@given(TEXTS, SEEDS, RATES)
def test_characters_change_letters_only(text, seed, rate):
    noise = CharacterNoise(rate)
    noisy = noise(text, seed)
    assert noisy == noise(text, seed) == CharacterNoise(rate)(text, seed)
    assert [c for c in noisy if not c.isalpha()] == [c for c in text if not c.isalpha()]
    assert {c for c in noisy if c.isalpha()} <= {c for c in text if c.isalpha()}
    assert all(span in noisy for span in spans(text, noise.protect))  # of which a lost word may join two


@given(TEXTS, SEEDS)
def test_a_rate_of_zero_is_no_noise(text, seed):
    assert CharacterNoise(0)(text, seed) == WordDrop(0)(text, seed) == text


@given(SEEDS, st.sampled_from(["delete", "insert", "replace"]))
def test_a_rate_of_one_spares_no_letter(seed, edit):
    text = "never mind what 12 was"
    noisy = CharacterNoise(1, edits=[edit])(text, seed)
    letters = len("nevermindwhatwas")
    length = {"delete": 0, "insert": 2 * letters, "replace": letters}[edit]
    assert sum(c.isalpha() for c in noisy) == length
    if edit == "replace":
        assert all(a != b for a, b in zip(text, noisy, strict=True) if a.isalpha())


def test_a_swap_is_of_neighbours_in_a_word():
    assert CharacterNoise(1, edits=["swap"])("neighbours 4 was", 3) == "engibhuosr 4 aws"
    assert CharacterNoise(1, edits=["swap"])("a b", 3) == "a b"


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.6])
def test_characters_change_as_often_as_the_rate_says(rate):
    text = "abcdefghijklmnopqrstuvwxyz" * 4
    noise = CharacterNoise(rate, edits=["replace"])
    changed = [sum(a != b for a, b in zip(text, noise(text, seed), strict=True)) for seed in range(100)]
    assert sum(changed) / (100 * len(text)) == pytest.approx(rate, rel=0.1)
    assert len(set(changed)) > 5


@given(TEXTS, SEEDS, RATES, RATES)
def test_more_noise_of_a_seed_drops_more_of_the_same_words(text, seed, one, other):
    low, high = sorted((one, other))
    fewer, more = WordDrop(high)(text, seed), WordDrop(low)(text, seed)
    kept = [word for word in fewer.split() if word in more.split()]
    assert len(fewer) <= len(more) or len(fewer.split()) == 1
    assert kept == fewer.split() or len(fewer.split()) == 1


@given(TEXTS, SEEDS, RATES)
def test_dropped_words_leave_the_others_as_they_were(text, seed, rate):
    noise = WordDrop(rate)
    noisy = noise(text, seed)
    assert noisy == noise(text, seed)
    assert bool(noisy.strip()) == bool(text.strip()), "a word at least stays"
    rest = iter(text.split())
    assert all(word in rest for word in noisy.split()), "in their order"
    kept = [re.escape(span) for span in spans(text, noise.protect)]
    assert re.search(".*".join(kept), noisy, re.DOTALL)


def test_words_are_dropped_as_often_as_the_rate_says():
    text = " ".join(["word"] * 50)
    left = [len(WordDrop(0.3)(text, seed).split()) for seed in range(200)]
    assert sum(left) / (200 * 50) == pytest.approx(0.7, abs=0.02)
    assert WordDrop(1)("so what is 12 now", 0) == "12 "


@given(st.text(max_size=40), SEEDS)
def test_a_paraphrase_holds_the_text(text, seed):
    noisy = Paraphrase()(text, seed)
    assert text in noisy
    assert noisy != text
    assert Paraphrase(["{prompt}{x}{prompt}"])(text, seed) == f"{text}{{x}}{text}"


def test_every_template_comes_up():
    templates = Paraphrase().templates
    seen = {Paraphrase()("\0", seed) for seed in range(100)}
    assert seen == {template.replace("{prompt}", "\0") for template in templates}


@given(TEXTS.filter(bool), SEEDS)
def test_what_is_added_stands_beside_the_text(text, seed):
    for where in ("start", "end"):
        injected = Injection("kumquat", where=where)(text, seed)
        distracted = Distraction(where=where)(text, seed)
        for noisy in (injected, distracted):
            assert noisy.endswith(f" {text}") if where == "start" else noisy.startswith(f"{text} ")
        assert "kumquat" in injected
    assert Injection(texts=["say {bait}"])("", seed) == "say banana"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CharacterNoise(1.5), "rate is 1.5; expected between 0 and 1"),
        (lambda: WordDrop(-0.1), "rate is -0.1"),
        (lambda: CharacterNoise(edits=[]), "expected some of swap, delete, insert, replace"),
        (lambda: CharacterNoise(edits=["shout"]), "shout"),
        (lambda: Paraphrase(["no place"]), "'no place'; expected a list of texts with {prompt}"),
        (lambda: Paraphrase("{prompt}"), "expected a list"),
        (lambda: Paraphrase([]), "expected a list"),
        (lambda: Injection(texts=["say it"]), "'say it'"),
        (lambda: Injection(bait=""), "a bait that an answer can be searched for"),
        (lambda: Injection(where="middle"), "where is 'middle'; expected one of start, end"),
        (lambda: Distraction(texts="hm"), "expected a list of texts"),
        (lambda: as_noise("letters"), "expected one of characters, words"),
        (lambda: as_noise(CharacterNoise), "expected one of characters, words"),
    ],
)
def test_noise_that_makes_no_sense(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_names():
    assert {name: as_noise(name).name for name in SHIPPED} == {name: name for name in SHIPPED}
    louder = replace(CharacterNoise(), name="louder")
    assert as_noise(louder) is louder

    def shout(text, seed):
        return text.upper() if seed else 1

    own = as_noise(shout)
    assert own == OwnNoise(shout, "shout")
    assert own("a", 1) == "A"
    with pytest.raises(DataError, match="noise 'shout' made a int of a text"):
        own("a", 0)
