import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from etude.data.formats import COLUMNS, detect_format, to_episode, to_episodes, to_prompt
from etude.errors import DataError, TemplateError
from etude.types import Episode, Segment

CHATML = (
    "{% for t in tools or [] %}{{ t.name }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, add_bos: bool = False, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, add_bos_token=add_bos
    )
    tokenizer.add_tokens(["<call>", "<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZER, WITH_BOS = byte_tokenizer(), byte_tokenizer(add_bos=True)


def targets(episode: Episode, tokenizer=TOKENIZER) -> str:
    """The imitated tokens, decoded."""
    return tokenizer.decode([i for i, t in zip(episode.token_ids, episode.target, strict=True) if t])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text", "id"], "text"),
        (["completion", "prompt"], "prompt-completion"),
        (["prompt", "messages"], "messages"),
        (["task", "segments", "rewards"], "segments"),
    ],
)
def test_formats_are_told_by_their_columns(columns, expected):
    assert detect_format(columns) == expected


@pytest.mark.parametrize(
    ("columns", "accepted", "expected"),
    [
        (["prompt", "completion", "label"], ["prompt", "prompt-completion"], "prompt-completion"),
        (["prompt", "completion", "label"], COLUMNS, "unpaired-preference"),
        (["prompt", "chosen", "rejected"], ["prompt"], "prompt"),
        (["chosen", "rejected", "margin"], COLUMNS, "preference"),
        (["prompt", "chosen", "rejected"], COLUMNS, "preference"),
        (["prompt", "completions", "labels"], COLUMNS, "stepwise"),
    ],
)
def test_a_trainer_says_what_it_accepts(columns, accepted, expected):
    assert detect_format(columns, tuple(accepted)) == expected


def test_columns_that_fit_nothing_or_too_much():
    with pytest.raises(DataError, match=r"'instruction', 'output'; .*: segments; messages; prompt \+"):
        detect_format(["instruction", "output"])
    with pytest.raises(
        DataError,
        match=r"'prompt', 'chosen' \(prompt\); expected .*: \[prompt \+\] chosen \+ rejected; prompt \+",
    ):
        detect_format(["prompt", "chosen"], ["preference", "stepwise"])
    with pytest.raises(DataError, match=r"the columns are none; expected"):
        detect_format([])
    with pytest.raises(DataError, match=r"\('text', 'messages'\) fit 2 formats: messages, text"):
        detect_format(["text", "messages"])


def test_text_is_imitated_whole_but_for_the_bos():
    episode = to_episode({"text": "hi there", "id": 3}, WITH_BOS)
    assert targets(episode, WITH_BOS) == "hi there</s>"
    assert WITH_BOS.decode(episode.token_ids) == "<s>hi there</s>"
    assert episode.task == {"text": "hi there", "id": 3}
    assert [(s.source, s.target) for s in episode.segments] == [
        ("prompt", False), ("model", True), ("environment", True),
    ]  # fmt: skip
    assert to_episode({"text": "<s>hi"}, WITH_BOS).token_ids.count(WITH_BOS.bos_token_id) == 1


def test_the_eos_is_appended_once():
    for text in ("hi", "hi</s>"):
        assert to_episode({"text": text}, TOKENIZER).token_ids.count(TOKENIZER.eos_token_id) == 1
    eos = to_episode({"text": "hi"}, TOKENIZER).segments[-1]
    assert eos == Segment("environment", "</s>", [TOKENIZER.eos_token_id], target=True)
    assert targets(to_episode({"text": "hi"}, TOKENIZER, append_eos=False)) == "hi"
    with pytest.raises(DataError, match="append_eos=False"):
        to_episode({"text": "hi"}, byte_tokenizer(eos=None))


def test_only_the_completion_is_imitated():
    row = {"prompt": "2+2=", "completion": "4"}
    episode = to_episode(row, WITH_BOS)
    assert targets(episode, WITH_BOS) == "4</s>"
    assert WITH_BOS.decode(episode.token_ids) == "<s>2+2=4</s>"
    assert (episode.prompt, episode.completion) == ("2+2=", "4")
    assert targets(to_episode(row, TOKENIZER, completion_only_loss=False)) == "2+2=4</s>"


MESSAGES = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "tool", "content": "ok<call>"},
    {"role": "assistant", "content": "Yes"},
]


def test_messages():
    episode = to_episode({"messages": MESSAGES}, TOKENIZER)
    assert targets(episode) == "4<|im_end|>Yes<|im_end|>"
    assert TOKENIZER.eos_token_id not in episode.token_ids, "a conversation ends as its template ends it"
    everything = to_episode({"messages": MESSAGES}, TOKENIZER, assistant_only_loss=False)
    assert targets(everything) == TOKENIZER.apply_chat_template(MESSAGES, tokenize=False)
    assert TOKENIZER.convert_tokens_to_ids("<call>") not in episode.token_ids


def test_tools_are_rendered_from_a_list_or_json():
    tools = [{"name": "calculator"}]
    for value in (tools, json.dumps(tools)):
        assert to_episode({"messages": MESSAGES, "tools": value}, TOKENIZER).prompt.startswith("calculator\n")
    for nothing in (None, [], "", "[]", "null"):
        episode = to_episode({"messages": MESSAGES, "tools": nothing}, TOKENIZER)
        assert episode.prompt.startswith("<|im_start|>user")


def test_options_of_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ style }}" + CHATML
    for value in ({"style": "terse", "other": None}, '{"style": "terse"}'):
        row = {"messages": MESSAGES, "chat_template_kwargs": value}
        assert to_episode(row, tokenizer).prompt.startswith("terse<|im_start|>")
        assert to_prompt({**row, "prompt": MESSAGES[:1]}, tokenizer).text.startswith("terse<|im_start|>")


def test_a_template_without_an_end_of_turn():
    """The EOS ends what the assistant says last, and nothing else."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert targets(to_episode({"messages": MESSAGES}, tokenizer)) == "4\nYes\n</s>"
    asked = {"messages": [*MESSAGES[:2], {"role": "user", "content": "Sure?"}]}
    assert targets(to_episode(asked, tokenizer)) == "4\n"
    whole = {"assistant_only_loss": False}
    assert targets(to_episode(asked, tokenizer, **whole)).endswith("user: Sure?\n")
    assert targets(to_episode({"messages": MESSAGES}, tokenizer, **whole)).endswith("assistant: Yes\n</s>")


def test_prompts():
    assert to_prompt({"prompt": "2+2="}, WITH_BOS) == Segment("prompt", "2+2=", WITH_BOS("2+2=")["input_ids"])
    for messages, end in (
        (MESSAGES[:1], "<|im_start|>assistant\n"),
        (MESSAGES[:2], "<|im_start|>assistant\n4"),
    ):
        asked = to_prompt({"prompt": messages}, TOKENIZER)
        assert asked.text.endswith(end)
        assert TOKENIZER.decode(asked.token_ids) == asked.text
    with pytest.raises(DataError, match="prompt is a int; expected a string or a list of messages"):
        to_prompt({"prompt": 3}, TOKENIZER)


def test_a_conversation_may_take_several_texts():
    """A template that shows what was last said only."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("in messages %}<", "in messages[-2:] %}<")
    episodes = to_episodes({"messages": MESSAGES, "id": 3}, tokenizer)
    assert [targets(episode) for episode in episodes] == ["4<|im_end|>", "Yes<|im_end|>"]
    assert [episode.task["id"] for episode in episodes] == [3, 3]
    with pytest.raises(TemplateError, match=r"rewrites earlier turns .* fit in 2 texts and not in one"):
        to_episode({"messages": MESSAGES}, tokenizer)
    [whole] = to_episodes({"messages": MESSAGES}, tokenizer, assistant_only_loss=False)
    assert targets(whole) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "Yes<|im_end|>"),
        ({"assistant_only_loss": False}, "Yes<|im_end|>\n"),
        ({"completion_only_loss": False}, "4<|im_end|>Yes<|im_end|>"),
        (
            {"completion_only_loss": False, "assistant_only_loss": False},
            TOKENIZER.apply_chat_template(MESSAGES, tokenize=False),
        ),
    ],
)
def test_prompt_and_completion_as_messages(options, expected):
    row = {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}
    episode = to_episode(row, TOKENIZER, **options)
    assert targets(episode) == expected
    assert TOKENIZER.decode(episode.token_ids) == TOKENIZER.apply_chat_template(MESSAGES, tokenize=False)


STORED = [
    {"source": "prompt", "text": "2*3?"},
    {"source": "model", "text": "<call>2*3"},
    {"source": "tool", "text": "6<call>"},
    {"source": "model", "text": "It is 6"},
]


def test_segments():
    episode = to_episode({"segments": STORED}, WITH_BOS)
    assert targets(episode, WITH_BOS) == "<call>2*3It is 6</s>"
    assert WITH_BOS.decode(episode.token_ids) == "<s>2*3?<call>2*36<call>It is 6</s>"
    assert episode.token_ids.count(WITH_BOS.convert_tokens_to_ids("<call>")) == 1, "the tool's is text"
    assert targets(to_episode({"segments": STORED[:3]}, TOKENIZER)) == "<call>2*3", "the model didn't end it"
    everything = to_episode({"segments": STORED}, TOKENIZER, completion_only_loss=False)
    assert targets(everything) == "2*3?<call>2*36<call>It is 6</s>"


def test_segments_keep_the_tokens_that_were_sampled():
    """A stored episode: "ab" sampled as two tokens, and an end of turn that its text doesn't show."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["ab"])
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    sampled = [a, b, tokenizer.eos_token_id]
    assert to_episode({"segments": [{"source": "model", "text": "ab"}]}, tokenizer).token_ids != sampled
    stored = Episode(
        segments=[
            Segment("prompt", "2?", tokenizer.encode("2?")),
            Segment("model", "ab", sampled, logprobs=[-1.0, -2.0, -0.5]),
        ]
    )
    again = to_episode(json.loads(json.dumps(stored.to_json())), tokenizer)
    assert again.token_ids == stored.token_ids
    assert targets(again, tokenizer) == "ab</s>"
    assert not any(again.sampled), "another run's tokens are not this policy's"


@pytest.mark.parametrize("ids", [[0, 1], [100_000]])
def test_the_tokens_of_another_tokenizer_are_refused(ids):
    with pytest.raises(DataError, match="token_ids of segment 0 come from another tokenizer"):
        to_episode({"segments": [{"source": "model", "text": "ab", "token_ids": ids}]}, TOKENIZER)


@pytest.mark.parametrize(
    ("row", "options", "match"),
    [
        ({"text": "a"}, {"completion_only_loss": True}, "rows of 'text' have no completion"),
        ({"messages": MESSAGES}, {"completion_only_loss": True}, "rows of 'messages' have no completion"),
        ({"text": 3}, {}, "text is a int"),
        ({"prompt": "a", "completion": None}, {}, "prompt is a str and completion a NoneType"),
        ({"messages": None}, {}, "messages is a NoneType; expected a list of messages"),
        ({"messages": '[{"role": "user"}]'}, {}, "messages is a str; expected a list of messages"),
        ({"prompt": "a", "completion": MESSAGES}, {}, "expected two strings or two lists of messages"),
        ({"segments": [{"source": "modle", "text": "a"}]}, {}, "segment 0 is .*'source' among prompt, model"),
        ({"segments": ["a"]}, {}, "segment 0 is a;"),
        ({"messages": MESSAGES, "tools": "no JSON"}, {}, r"tools is not JSON \(.*\): 'no JSON'"),
        ({"messages": MESSAGES, "tools": {"a": 1}}, {}, "tools is a dict; expected a list, or its JSON"),
        (
            {"messages": MESSAGES, "chat_template_kwargs": [1]},
            {},
            "chat_template_kwargs is a list; expected a dict",
        ),
    ],
)
def test_rows_that_are_wrong(row, options, match):
    with pytest.raises(DataError, match=match):
        to_episode(row, TOKENIZER, **options)
