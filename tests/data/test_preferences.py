import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from template_families import FAMILIES, THINKING, TOOLS, family_tokenizer

from etude.data.preferences import to_preference, to_rating
from etude.errors import DataError, TemplateError

GPT, LLAMA = family_tokenizer("qwen2.5"), family_tokenizer("llama-2")


def targets(episode, tokenizer=GPT):
    return tokenizer.decode([i for i, t in zip(episode.token_ids, episode.target, strict=True) if t])


def prompt(episode):
    """The tokens before the first target."""
    return episode.token_ids[: episode.target.index(True)]


def test_strings_are_plain_text_with_an_eos():
    pair = to_preference({"prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 2}, GPT)
    assert (targets(pair.chosen), targets(pair.rejected)) == ("4<|im_end|>", "5<|im_end|>")
    assert prompt(pair.chosen) == prompt(pair.rejected) == GPT("2+2=")["input_ids"]
    assert pair.margin == 2.0
    assert pair.chosen.task == pair.rejected.task == {
        "prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 2
    }  # fmt: skip
    open_end = to_preference({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, GPT, append_eos=False)
    assert (targets(open_end.chosen), open_end.margin) == ("4", None)


def test_messages_go_through_the_template():
    ask, call, told, answer, *_ = TOOLS
    wrong = {"role": "assistant", "content": "It is 6."}
    row = {
        "prompt": [ask],
        "chosen": [call, told, answer],
        "rejected": [wrong],
        "tools": FAMILIES["qwen2.5"].tools,
    }
    pair = to_preference(row, GPT)
    call_text, answer_text, _ = FAMILIES["qwen2.5"].turns["tools"][0]
    assert targets(pair.chosen) == call_text + answer_text, "what the tool said is no answer"
    assert targets(pair.rejected) == "It is 6.<|im_end|>"
    asked = GPT.apply_chat_template([ask], tools=row["tools"], add_generation_prompt=True)["input_ids"]
    assert prompt(pair.chosen) == prompt(pair.rejected) == asked


def test_a_template_that_drops_reasoning_of_the_prompt():
    """Qwen3's: what is compared is the answer, with its reasoning; the prompt's is gone, as at inference."""
    tokenizer = family_tokenizer("qwen3")
    wrong = {"role": "assistant", "content": "No.", "reasoning_content": "I am not."}
    pair = to_preference({"chosen": THINKING, "rejected": [*THINKING[:-1], wrong]}, tokenizer)
    assert targets(pair.rejected, tokenizer) == "<think>\nI am not.\n</think>\n\nNo.<|im_end|>"
    asked = tokenizer.apply_chat_template(THINKING[:-1], add_generation_prompt=True)["input_ids"]
    assert prompt(pair.chosen) == prompt(pair.rejected) == asked


def test_options_of_the_template():
    tokenizer = family_tokenizer("qwen3")
    row = {"prompt": THINKING[:1], "chosen": [{"role": "assistant", "content": "4"}]}
    row |= {"rejected": [{"role": "assistant", "content": "5"}]}
    assert targets(to_preference(row, tokenizer).chosen, tokenizer) == "<think>\n\n</think>\n\n4<|im_end|>"
    for kwargs in ({"enable_thinking": False, "other": None}, '{"enable_thinking": false}'):
        quick = to_preference({**row, "chat_template_kwargs": kwargs}, tokenizer)
        assert targets(quick.chosen, tokenizer) == "4<|im_end|>"


def test_a_prompt_that_the_answer_changes_is_refused():
    tokenizer = copy.deepcopy(GPT)
    tokenizer.chat_template = (
        "{{ 'Think.' if messages[-1].thinking }}{% for m in messages %}{{ m.role }}:"
        "{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
    answer = {"role": "assistant", "content": "4"}
    row = {"prompt": TOOLS[:1], "chosen": [answer], "rejected": [{**answer, "content": "5"}]}
    assert prompt(to_preference(row, tokenizer).chosen)
    row["chosen"] = [{**answer, "thinking": "4"}]
    with pytest.raises(TemplateError, match=r"prompt differently before the chosen .*: 'Think.user:What"):
        to_preference(row, tokenizer)


@given(
    st.text("ab <é\n", max_size=9),
    st.text("ab <é\n", min_size=1, max_size=6),
    st.text("ab <é\n", min_size=1, max_size=6),
)
@pytest.mark.parametrize("tokenizer", [GPT, LLAMA], ids=["byte level", "llama"])
def test_both_answers_follow_the_same_tokens(tokenizer, asked, chosen, rejected):
    pair = to_preference({"prompt": asked, "chosen": chosen, "rejected": rejected}, tokenizer)
    whole = pair.chosen, pair.rejected
    if asked:
        assert prompt(pair.chosen) == prompt(pair.rejected) == tokenizer(asked)["input_ids"]
    for episode, answer in zip(whole, (chosen, rejected), strict=True):
        assert episode.completion == answer
        first = episode.target.index(True)
        assert all(episode.target[first:])
        assert not any(episode.target[:first])
        assert episode.token_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_ratings(label):
    rating = to_rating({"prompt": "2+2=", "completion": "4", "label": label, "text": "no format"}, GPT)
    assert rating.desirable is bool(label)
    assert targets(rating.episode) == "4<|im_end|>"
    assert rating.episode.task["label"] is label


def test_rated_messages():
    rating = to_rating({"prompt": TOOLS[:3], "completion": TOOLS[3:4], "label": True}, GPT)
    assert targets(rating.episode) == "It is 5.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"chosen": "4", "rejected": "5", "prompt": "a", "margin": "big"},
            "margin is 'big'; expected a finite",
        ),
        ({"chosen": "4", "rejected": "5", "prompt": "a", "margin": float("nan")}, "margin is nan"),
        ({"chosen": "4", "rejected": 5, "prompt": "a"}, "rejected is a int"),
    ],
)
def test_preferences_that_are_wrong(row, match):
    with pytest.raises(DataError, match=match):
        to_preference(row, GPT)


@pytest.mark.parametrize("label", [None, "yes", 2, 0.5])
def test_labels_that_are_wrong(label):
    with pytest.raises(DataError, match=r"label is .*; expected true \(wanted\) or false"):
        to_rating({"prompt": "a", "completion": "b", "label": label}, GPT)


def test_an_answer_of_several_turns_that_no_text_holds_is_refused():
    row = {"prompt": THINKING[:1], "chosen": THINKING[1:], "rejected": THINKING[1:2]}
    tokenizer = family_tokenizer("qwen3")
    with pytest.raises(TemplateError, match="turns fit in 2 texts and not in one"):
        to_preference(row, tokenizer)
    read = to_preference(row, tokenizer, scored=True)
    assert read.chosen.token_ids == tokenizer.apply_chat_template(THINKING)["input_ids"]
    assert read.rejected.token_ids == tokenizer.apply_chat_template(THINKING[:2])["input_ids"]
