import logging
import re

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from etude.data.conversions import convert, split_prompt, unpair
from etude.data.files import load_rows
from etude.data.formats import DEMONSTRATIONS
from etude.errors import DataError

ASK = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 1.5}


def call(**arguments):
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is brown.", "The sky is"),  # not within the word
        ("2+2=4", "2+2=5", "2+2="),
        ("2+2=14", "2+2=15", "2+2="),
        ("Q: a?\n\nA: Yes", "Q: a?\n\nA: Yes, sure", "Q: a?\n\nA:"),  # something is left of both
        ("Q: a?\nA:\nYes", "Q: a?\nA:\nNo", "Q: a?\nA:\n"),
        ("It's new", "It's old", "It's"),
        ("I'm ok", "I am ok", "I"),
        ("a  b", "a  c", "a "),
    ],
)
def test_an_implicit_prompt_of_strings(chosen, rejected, prompt):
    row = split_prompt({"chosen": chosen, "rejected": rejected, "id": 7})
    assert row == {
        "prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :], "id": 7
    }  # fmt: skip


@given(st.text("ab é'\n", max_size=8), st.text("ab é'\n", max_size=6), st.text("ab é'\n", max_size=6))
def test_an_implicit_prompt_loses_nothing_and_leaves_something(common, left, right):
    chosen, rejected = f"Q:{common}{left}", f"Q:{common}{right}"
    row = split_prompt({"chosen": chosen, "rejected": rejected})
    assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) == (chosen, rejected)
    assert all(row.values()), "something is left of each"
    for answer in (row["chosen"], row["rejected"]):
        inside = re.search(r"\w\Z", row["prompt"]) and re.match(r"\w", answer)
        assert not inside, "no word is cut in two"


@pytest.mark.parametrize(
    ("chosen", "rejected", "length"),
    [
        ([ASK, FOUR], [ASK, FIVE], 1),
        ([ASK, FOUR], [ASK, FOUR], 1),
        ([ASK, FOUR, ASK, FIVE], [ASK, FOUR, ASK, FOUR], 3),
        ([ASK, FOUR, ASK, FIVE], [ASK, FOUR], 1),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"prompt": "2+2?"}, {"prompt": None}])
def test_an_implicit_prompt_of_messages(chosen, rejected, length, beside):
    """A prompt in words repeats the user's message, as in UltraFeedback's pairs: the conversations count."""
    row = split_prompt({"chosen": chosen, "rejected": rejected, **beside})
    assert row == {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def test_an_explicit_prompt_stays():
    assert split_prompt(PAIR) == PAIR
    row = {"prompt": [ASK], "chosen": [FOUR], "rejected": [FOUR]}
    assert split_prompt(row) == row


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"chosen": "a b", "rejected": "c d"}, "no prompt, and chosen and rejected begin with nothing in"),
        ({"chosen": "", "rejected": ""}, "nothing in common: '' and ''"),
        ({"chosen": [FOUR], "rejected": [FIVE], "prompt": "2+2?"}, "nothing in common"),
        ({"chosen": "a", "rejected": None}, "chosen is a str; expected two strings or two lists of messages"),
        ({"chosen": "a", "rejected": [FIVE], "prompt": "b"}, "rejected is a list; expected two strings or"),
        ({"chosen": "a", "rejected": "b", "prompt": [ASK]}, "prompt is a list and the answers are strs"),
        ({"chosen": [FOUR], "rejected": [FIVE], "prompt": 3}, "prompt is a int and the answers are lists"),
    ],
)  # fmt: skip
def test_preferences_that_are_wrong(row, match):
    with pytest.raises(DataError, match=match):
        split_prompt(row)


def test_a_pair_becomes_two_ratings():
    assert unpair(PAIR) == [
        {"prompt": "2+2=", "margin": 1.5, "completion": "4", "label": True},
        {"prompt": "2+2=", "margin": 1.5, "completion": "5", "label": False},
    ]
    implicit = {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE]}
    assert [row["completion"] for row in unpair(implicit)] == [[FOUR], [FIVE]]


@pytest.mark.parametrize(
    ("rows", "accepted"),
    [
        ([PAIR], ["preference"]),
        ([PAIR], ["prompt"]),
        ([{"text": "a"}], DEMONSTRATIONS),
        ([{"prompt": "a", "completion": "b", "label": True}], ["unpaired-preference", "preference"]),
        ([{"prompt": "a", "completion": "b", "label": True}], ["unpaired-preference", "prompt-completion"]),
        ([{"prompt": "a", "completion": "b", "label": "news"}], ["prompt-completion"]),  # another column
    ],
)
def test_what_is_accepted_stays(rows, accepted):
    dataset = load_rows(rows)
    assert convert(dataset, accepted) is dataset


def test_preferences_become_ratings(caplog):
    caplog.set_level(logging.INFO, "etude")
    rated = convert(load_rows([PAIR, {**PAIR, "chosen": "four"}]), ["unpaired-preference"])
    assert list(rated["completion"]) == ["4", "5", "four", "5"]
    assert list(rated["label"]) == [True, False, True, False]
    assert list(rated["prompt"]) == ["2+2="] * 4
    assert list(rated["margin"]) == [1.5] * 4
    assert "two rated answers" in caplog.text


def test_preferences_become_demonstrations_of_what_was_chosen(caplog):
    shown = convert(load_rows([{"chosen": "a b", "rejected": "a c"}]), DEMONSTRATIONS)
    assert list(shown) == [{"prompt": "a", "completion": " b"}]
    assert "chosen answers are imitated, the rejected ones unused" in caplog.text


@pytest.mark.parametrize("kind", [bool, int])
def test_ratings_become_demonstrations_of_what_was_wanted(caplog, kind):
    rows = [{"prompt": "2+2=", "completion": str(n), "label": kind(n == 4)} for n in range(3, 6)]
    assert list(convert(load_rows(rows), DEMONSTRATIONS)) == [{"prompt": "2+2=", "completion": "4"}]
    assert "1 of 3 answers are wanted" in caplog.text
    with pytest.raises(DataError, match="none of the 1 answers is wanted"):
        convert(load_rows(rows[:1]), DEMONSTRATIONS)


def test_implicit_prompts_become_prompts():
    asked = convert(load_rows([{"chosen": [ASK, FOUR], "rejected": [ASK, FIVE], "id": 3}]), ["prompt"])
    assert list(asked) == [{"prompt": [ASK], "id": 3}]


def test_tool_calls_survive_conversion():
    """Arguments that differ in names and types, within and between the columns that are joined."""
    rows = [
        {"chosen": [ASK, call(a=1)], "rejected": [ASK, call(b="x"), {"role": "tool", "content": "?"}]},
        {"chosen": [ASK, call(a="1", c=None)], "rejected": [ASK, FIVE]},
    ]
    for dataset in (load_rows(rows), load_rows([{**row, "prompt": "2+2?"} for row in rows])):
        rated = list(convert(dataset, ["unpaired-preference"]))
        assert [row["completion"] for row in rated] == [
            rows[0]["chosen"][1:], rows[0]["rejected"][1:], rows[1]["chosen"][1:], rows[1]["rejected"][1:]
        ]  # fmt: skip
        assert [row["prompt"] for row in rated] == [[ASK]] * 4


def test_messages_with_other_keys_fit_in_one_column():
    named = {"role": "tool", "content": "4", "name": "add"}
    table = Dataset.from_list([{"chosen": [ASK, FOUR], "rejected": [ASK, named]}])
    assert table.features["chosen"] != table.features["rejected"]
    rated = convert(table, ["unpaired-preference"])
    assert list(rated["completion"]) == [[FOUR], [named]]


def test_rows_of_texts_and_of_messages_stay_what_they_are():
    """In one column, which is JSON then: nothing is read into a text."""
    messages = {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE], "margin": 1.0}
    first, _, third, _ = convert(load_rows([PAIR, messages]), ("unpaired-preference",))
    assert (first["prompt"], first["completion"]) == ("2+2=", "4")
    assert (third["prompt"], third["completion"]) == ([ASK], [FOUR])


def test_what_cannot_be_made_is_refused():
    with pytest.raises(DataError, match=r"'prompt', 'completion' \(prompt-completion\); expected .*chosen"):
        convert(load_rows([{"prompt": "a", "completion": "b"}]), ["preference"])
    with pytest.raises(DataError, match=r"\(preference\); expected one of these combinations: messages\."):
        convert(load_rows([{"chosen": "a", "rejected": "b"}]), ["messages"])


def test_a_row_that_is_wrong_is_named():
    dataset = Dataset.from_dict({"chosen": ["a b"] * 101 + ["a"], "rejected": ["a c"] * 101 + ["b"]})
    with pytest.raises(DataError, match="row 101: the row has no prompt"):
        convert(dataset, ["unpaired-preference"])
