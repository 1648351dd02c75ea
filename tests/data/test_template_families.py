"""Real templates: what is learned is what the model says, after what it has read when it says that.

Tokenizers merge across every seam, and Llama's relatives put spaces after special tokens, so equal ids are no
accident.
"""

import json

import pytest
from template_families import CHAT, FAMILIES, TEMPLATES, THINKING, TOOLS, family_tokenizer

from etude.data.encoding import encode_control
from etude.data.formats import to_episodes
from etude.data.templates import conversation_rows, prompt_segment
from etude.errors import TemplateError

CASES = [(family, kind) for family, expected in FAMILIES.items() for kind in expected.turns]
each_case = pytest.mark.parametrize(("family", "kind"), CASES, ids=map("-".join, CASES))


def tokens(segments):
    return [token for segment in segments for token in segment.token_ids]


def conversation(family, kind):
    """Its messages, with arguments of calls as the template takes them."""
    messages = FAMILIES[family].conversations[kind]
    return json_arguments(messages) if family.startswith("deepseek") else messages


def json_arguments(messages):
    def as_json(call):
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}

    return [
        {**m, "tool_calls": [as_json(call) for call in m["tool_calls"]]} if "tool_calls" in m else m
        for m in messages
    ]


def rows(family, kind):
    expected = FAMILIES[family]
    return conversation_rows(family_tokenizer(family), conversation(family, kind), expected.tools)


@each_case
def test_the_turns_that_are_learned(family, kind):
    learned = [[segment.text for segment in row if segment.target] for row in rows(family, kind)]
    assert learned == FAMILIES[family].turns[kind]


@each_case
def test_the_last_row_is_the_whole_conversation_as_the_tokenizer_has_it(family, kind):
    whole = family_tokenizer(family).apply_chat_template(
        conversation(family, kind), tools=FAMILIES[family].tools
    )
    assert tokens(rows(family, kind)[-1]) == whole["input_ids"]


@each_case
def test_each_turn_follows_what_the_model_is_asked_with(family, kind):
    """The tokens before a turn are the prompt that a sampler would get for it; in marked templates almost."""
    tokenizer, messages = family_tokenizer(family), conversation(family, kind)
    turns = {}
    for row in rows(family, kind):
        for index, segment in enumerate(row):
            if segment.target:
                turns[segment.text] = tokens(row[:index])
    asked = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(turns) == len(asked)
    prompts = [
        tokenizer.apply_chat_template(
            messages[:position], tools=FAMILIES[family].tools, add_generation_prompt=True
        )["input_ids"]
        for position in asked
    ]
    if family == "deepseek-r1-marked":  # the header's "<think>\n" is the turn's own beginning
        prompts = [prompt[:-2] for prompt in prompts]
    assert sorted(turns.values(), key=len) == sorted(prompts, key=len)


@each_case
def test_each_row_is_encoded_as_a_whole_would_be(family, kind):
    tokenizer = family_tokenizer(family)
    for row in rows(family, kind):
        text = "".join(segment.text for segment in row)
        assert tokens(row) == tokenizer(text, add_special_tokens=False)["input_ids"]


@each_case
def test_prompts_are_what_the_tokenizer_makes_of_them(family, kind):
    tokenizer, messages = family_tokenizer(family), conversation(family, kind)
    expected = tokenizer.apply_chat_template(
        messages[:-1], tools=FAMILIES[family].tools, add_generation_prompt=True
    )
    prompt = prompt_segment(tokenizer, messages[:-1], FAMILIES[family].tools)
    assert prompt.token_ids == expected["input_ids"]


def test_every_template_is_in_the_table():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)
    assert {family for family, expected in FAMILIES.items() if not expected.turns} == {"deepseek-r1"}


def test_pieces_encoded_for_themselves_would_differ():
    tokenizer, [row] = family_tokenizer("zephyr"), rows("zephyr", "chat")
    alone = [i for segment in row for i in tokenizer(segment.text, add_special_tokens=False)["input_ids"]]
    continued = [i for segment in row for i in encode_control(tokenizer, segment.text)]
    assert alone != tokens(row) != continued


def test_a_template_that_asks_otherwise_than_it_renders_is_refused():
    """DeepSeek-R1's asks with "<think>" and drops all reasoning: what it renders is never asked for."""
    with pytest.raises(TemplateError, match=r"header after message 0 .*chat_template_kwargs.*% generation %"):
        conversation_rows(family_tokenizer("deepseek-r1"), THINKING)


@pytest.mark.parametrize("thoughts", [{}, {"reasoning_content": "I'll add."}])
@pytest.mark.parametrize("family", ["hermes", "gpt-oss"])
def test_several_calls_that_are_alike(family, thoughts):
    """What was shown before an answer stands there several times once it is answered."""
    call = {**TOOLS[1], **(thoughts if family == "gpt-oss" else {})}
    messages = [TOOLS[0], call, TOOLS[2], call, TOOLS[2], TOOLS[3]]
    tokenizer = family_tokenizer(family)
    turns = [
        (tokens(row[:index]), segment.text)
        for row in conversation_rows(tokenizer, messages)
        for index, segment in enumerate(row)
        if segment.target
    ]
    assert len(turns) == 3
    for position in (1, 3, 5):
        asked = tokenizer.apply_chat_template(messages[:position], add_generation_prompt=True)["input_ids"]
        [said] = [text for prompt, text in turns if prompt == asked]
        assert ("It is 5." in said) == (position == 5)


def test_thoughts_that_are_dropped_once_there_is_an_answer():
    """gpt-oss' shows why a tool was called until the answer is there; that is learned with it shown."""
    call = {**TOOLS[1], "reasoning_content": "I'll add."}
    tokenizer = family_tokenizer("gpt-oss")
    [row] = conversation_rows(tokenizer, [TOOLS[0], call, *TOOLS[2:4]])
    thoughts = "<|channel|>analysis<|message|>I'll add.<|end|><|start|>assistant"
    called, answered = FAMILIES["gpt-oss"].turns["tools"][1][0], FAMILIES["gpt-oss"].turns["tools"][0][0]
    assert [segment.text for segment in row if segment.target] == [thoughts + called, answered]
    asked = tokenizer.apply_chat_template([TOOLS[0], call, TOOLS[2]], add_generation_prompt=True)["input_ids"]
    assert tokens(row[:-1]) == asked


def test_arguments_may_be_json():
    """OpenAI's interface gives a call's arguments as JSON; templates would quote that again."""
    for family in ("qwen2.5", "llama-3.1", "deepseek-v3"):
        tokenizer, tools = family_tokenizer(family), FAMILIES[family].tools
        assert conversation_rows(tokenizer, json_arguments(TOOLS), tools) == conversation_rows(
            tokenizer, TOOLS, tools
        )


@pytest.mark.parametrize(
    ("family", "append_eos", "end"),
    [
        ("glm-4.5", True, "<|endoftext|>"),
        ("glm-4.5", False, "."),
        ("phi-3", True, "<|end|>"),
        ("llama-3", True, "<|eot_id|>"),
    ],
)
def test_a_conversation_that_its_template_ends_by_nothing_ends_by_the_eos(family, append_eos, end):
    tokenizer = family_tokenizer(family)
    [episode] = to_episodes({"messages": CHAT}, tokenizer, append_eos=append_eos)
    learned = [token for token, target in zip(episode.token_ids, episode.target, strict=True) if target]
    assert tokenizer.decode(learned[-1]).endswith(end)
