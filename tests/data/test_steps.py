import copy

import pytest
from template_families import FAMILIES, TOOLS, family_tokenizer

from etude.data.steps import to_steps
from etude.errors import DataError

GPT, LLAMA = family_tokenizer("qwen2.5"), family_tokenizer("llama-2")
ROW = {"prompt": "2*3+1?", "completions": ["2*3 is 6.", "6+1 is 8."], "labels": [True, False]}


def texts(steps, tokenizer):
    """What each step ends, decoded from the beginning."""
    return [tokenizer.decode(steps.episode.token_ids[: end + 1]) for end in steps.ends]


@pytest.mark.parametrize("tokenizer", [GPT, LLAMA], ids=["byte level", "llama"])
def test_steps_end_after_their_separators(tokenizer):
    steps = to_steps(ROW, tokenizer)
    assert texts(steps, tokenizer) == ["2*3+1?2*3 is 6.\n", "2*3+1?2*3 is 6.\n6+1 is 8.\n"]
    assert steps.labels == [True, False]
    assert steps.ends[-1] == len(steps.episode) - 1
    assert steps.episode.prompt == "2*3+1?"
    assert steps.episode.task == ROW
    assert sum(steps.episode.target) == len(steps.episode) - len(steps.episode.segments[0].token_ids)


def test_other_separators():
    steps = to_steps(ROW, GPT, step_separator="<|endoftext|>")
    assert [steps.episode.token_ids[end] for end in steps.ends] == [
        GPT.convert_tokens_to_ids("<|endoftext|>")
    ] * 2
    bare = to_steps(ROW, GPT, step_separator="")
    assert texts(bare, GPT)[0] == "2*3+1?2*3 is 6."


def test_steps_that_answer_messages():
    steps = to_steps({**ROW, "prompt": TOOLS[:1]}, GPT)
    asked = GPT.apply_chat_template(TOOLS[:1], tokenize=False, add_generation_prompt=True)
    assert texts(steps, GPT)[0] == asked + "2*3 is 6.\n"


def test_turns_as_steps():
    ask, call, told, answer, *_ = TOOLS
    row = {"prompt": [ask], "completions": [[call, told], [answer]], "labels": [1, 0]}
    row |= {"tools": FAMILIES["qwen2.5"].tools}
    steps = to_steps(row, GPT)
    whole = GPT.apply_chat_template([ask, call, told, answer], tools=row["tools"], tokenize=False)
    assert texts(steps, GPT) == [whole[: whole.index("</tool_call><|im_end|>") + 22], whole.rstrip("\n")]
    assert steps.labels == [True, False]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": [True]}, "2 steps and 1 labels; expected one label per step"),
        ({"labels": [True, "no"]}, r"labels is \[True, 'no'\]; expected a list of true and false"),
        ({"labels": None}, "labels is None"),
        ({"completions": [], "labels": []}, r"completions is \[\]; expected a list of steps"),
        ({"completions": "two"}, "completions is two"),
        ({"completions": ["a", [TOOLS[1]]]}, "of type str, list; expected strings only, or lists of"),
        ({"completions": [TOOLS[1:2], TOOLS[2:3]]}, r"step 1 has messages of \['tool'\]; expected one of"),
        ({"completions": [TOOLS[1:2], TOOLS[3:4]]}, "prompt is a str and completion a list"),
    ],
)  # fmt: skip
def test_rows_that_are_wrong(change, match):
    with pytest.raises(DataError, match=match):
        to_steps({**ROW, **change}, GPT)


def test_a_template_that_marks_parts_of_a_turn_is_refused():
    tokenizer = copy.deepcopy(GPT)
    marked = "{% generation %}{{ m.content[0] }}{% endgeneration %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{marked}|{marked}{{% endfor %}}"
    row = {"prompt": TOOLS[:1], "completions": [TOOLS[3:4]], "labels": [True]}
    with pytest.raises(DataError, match="marks 2 parts of 1 turns; expected one in each"):
        to_steps(row, tokenizer)


def test_an_empty_step_needs_a_separator():
    row = {**ROW, "completions": ["", "8"]}
    assert texts(to_steps(row, GPT), GPT) == ["2*3+1?\n", "2*3+1?\n8\n"]
    with pytest.raises(DataError, match="step 0 is empty, and so is step_separator"):
        to_steps(row, GPT, step_separator="")
