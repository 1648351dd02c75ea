"""How calls are written is worked out from templates, and read back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, family_tokenizer

from etude.environments.call_format import FieldCalls, HeaderCalls, ObjectCalls, call_format, spoken
from etude.environments.chat_template import ChatTemplate, call_message
from etude.environments.tags import Call
from etude.errors import TemplateError
from etude.tools.function import tools_by_name


def look(city: str, days: int = 1, flags: list = (), deep: bool = False) -> str:
    """Look at the weather.

    Args:
        city: where.
        days: how many.
        flags: anything.
        deep: more.
    """
    return city


def template_of(family, **changes):
    tokenizer = family_tokenizer(family)
    return ChatTemplate(tokenizer, tools_by_name([look]), changes)


FORMS = {
    "llama-3.1": ObjectCalls("", "name", "parameters"),
    "mistral": ObjectCalls("[TOOL_CALLS] [", "name", "arguments"),
    "qwen2.5": ObjectCalls("<tool_call>", "name", "arguments"),
    "qwen3": ObjectCalls("<tool_call>", "name", "arguments"),
    "hermes": ObjectCalls("<tool_call>", "name", "arguments"),
    "deepseek-v3": HeaderCalls("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "```json"),
    "gpt-oss": HeaderCalls("to=functions.", "<|channel|>commentary json<|message|>"),
}
ARGUMENTS = [
    {"city": "Graz", "days": 2},
    {"city": 'a "b" {c}\n\\d', "flags": [1, 2], "deep": True},
    {},
]


@pytest.mark.parametrize("family", FORMS)
def test_the_form_is_the_template_s(family):
    assert call_format(template_of(family)).written == FORMS[family]


def test_others_are_read_as_hermes_writes():
    shown = {family for family in FAMILIES if template_of(family).shows_calls != 0}
    assert shown == {*FORMS, "glm-4.5"}
    for family in set(FAMILIES) - shown:
        assert call_format(template_of(family)).written == ObjectCalls()


@pytest.mark.parametrize("family", [*FORMS, "glm-4.5"])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_what_a_template_renders_is_read_back(family, arguments):
    template = template_of(family)
    several = 1 if template.shows_calls == 1 else 2
    calls = [call_message("look", arguments, "abcdefghi")] * several
    text = template.said(tool_calls=calls).removeprefix(template.header)
    assert "look" in text
    read = call_format(template).read(text)
    assert [(call.tool, call.arguments) for call in read] == [("look", arguments)] * several
    assert {call.id for call in read} == {"abcdefghi" if family == "mistral" else None}


def test_arguments_that_are_text_get_the_schema_s_types():
    """GLM writes values without quotes: what they are, the tool's schema says."""
    written = call_format(template_of("glm-4.5")).written
    assert isinstance(written, FieldCalls)
    text = (
        "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>many</arg_value>\n<arg_key>deep</arg_key>\n<arg_value>true</arg_value>\n</tool_call>"
    )
    assert written.read(text) == (Call("look", {"city": "12", "days": "many", "deep": True}),)


CODER = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments.items() %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""


@pytest.fixture
def coder():
    tokenizer = type(family_tokenizer("chatml"))(
        tokenizer_object=family_tokenizer("chatml").backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CODER
    return ChatTemplate(tokenizer, tools_by_name([look]), {})


def test_fields_keep_the_white_space_of_their_values(coder):
    form = call_format(coder)
    arguments = {"city": "    if x:\n        y\n", "days": 3, "flags": [1]}
    calls = [call_message("look", arguments, "1"), call_message("look", {}, "2")]
    text = coder.said(tool_calls=calls).removeprefix(coder.header)
    assert form.read(text) == (Call("look", arguments), Call("look", {}))
    assert form.read("<tool_call><function=look><parameter=days>3</parameter></function></tool_call>") == (
        Call("look", {"days": 3}),
    )
    assert form.read("<tool_call>\n<function=>") == (Call(None, ">"),)


HERMES = '<tool_call>\n{"name": "look", "arguments": {"city": "Graz"}}\n</tool_call>'
GRAZ = Call("look", {"city": "Graz"})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (HERMES, [GRAZ]),
        ("I look. " + HERMES + " Then " + HERMES, [GRAZ, GRAZ]),
        ('<tool_call>{"arguments":{"city":"Graz"},"name":"look"}', [GRAZ]),
        ('<tool_call>{"name": "look"}</tool_call>', [Call("look", {})]),
        (
            '<tool_call>{"name": "look", "arguments": "{\\"city\\": \\"Graz\\"}"}',
            [Call("look", '{"city": "Graz"}')],
        ),
        (
            '<tool_call>{"name": "look", "arguments": {"city": "two\nlines"}}',
            [Call("look", {"city": "two\nlines"})],
        ),
        (
            '<tool_call>{"name": "look", "arguments": {"city": "<tool_call>{"}}</tool_call>',
            [Call("look", {"city": "<tool_call>{"})],
        ),
        (
            '<tool_call>{"name": "look", "arguments": {"city"',
            [Call(None, '{"name": "look", "arguments": {"city"')],
        ),
        ("<tool_call>look(Graz)</tool_call>", [Call(None, "look(Graz)</tool_call>")]),
        ("<tool_call>", [Call(None, "")]),
        ('<tool_call>{"city": "Graz"}', [Call(None, '{"city": "Graz"}')]),
        ('<tool_call>{"name": 3, "arguments": {}}', [Call(None, '{"name": 3, "arguments": {}}')]),
        ('<tool_call>{"name": "look", "arguments": [1]}', [Call(None, '{"name": "look", "arguments": [1]}')]),
        (HERMES + "<tool_call>{", [GRAZ, Call(None, "{")]),
        ("<tool_call>" + "[" * 9000, [Call(None, "[" * 9000)]),
        ("<tool_call>" + '{"a":' * 9000, [Call(None, '{"a":' * 9000)]),
        ("It is 4.", []),
        ("", []),
    ],
)
def test_what_a_model_writes(text, calls):
    assert list(ObjectCalls().read(text)) == calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "look", "parameters": {"city": "Graz"}}', [GRAZ]),
        (' {"name": "look", "parameters": {"city": "Graz"}}; {"name":"look"}', [GRAZ, Call("look", {})]),
        ('{"answer": 5}', []),
        ('It is {"name": "look"}.', []),
        ('{"name": "look", "parameters": ', [Call(None, '{"name": "look", "parameters":')]),
    ],
)
def test_calls_that_nothing_introduces(text, calls):
    assert list(ObjectCalls("", "name", "parameters").read(text)) == calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (
            "<call>function<sep>look\n```json\n{}\n```<call>function<sep>look ```json{}",
            [Call("look", {})] * 2,
        ),
        ("<call>function<sep>look\n```json\n{oops", [Call(None, "look\n```json\n{oops")]),
        ("<call>function<sep>look {}", [Call(None, "look {}")]),
        ("<call>function<sep>", [Call(None, "")]),
        ("It is 4.", []),
    ],
)
def test_names_before_arguments(text, calls):
    assert list(HeaderCalls("<call>function<sep>", "```json").read(text)) == calls


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "\n\nYes."),
        ("Hm.\n</think>Yes.", "Yes."),
        ("Yes. <think>or no</think> Yes.", "Yes.  Yes."),
        ("<think>never ends", ""),
        ("Yes.", "Yes."),
    ],
)
def test_what_is_said_besides_thoughts(text, said):
    assert spoken(text) == said


def test_what_is_considered_is_not_called():
    form = call_format(template_of("qwen3"))
    assert form.read(f"<think>\nPerhaps {HERMES}\n</think>\n\nNo.") == ()
    assert form.read(f"<think>\nPerhaps {HERMES}\n</think>\n\n{HERMES}") == (GRAZ,)
    assert form.read(f"<think>\nPerhaps {HERMES}") == ()
    begun = call_format(template_of("deepseek-r1"))
    assert begun.thinking
    assert begun.read(f"Perhaps {HERMES}") == ()
    assert begun.read(f"Perhaps {HERMES}</think>{HERMES}") == (GRAZ,)


# As transformers has it for Qwen's.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


def test_a_tokenizer_s_own_response_template_comes_first(tmp_path):
    tokenizer = type(family_tokenizer("qwen2.5"))(
        tokenizer_object=family_tokenizer("qwen2.5").backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = family_tokenizer("qwen2.5").chat_template
    tokenizer.response_template = RESPONSE_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    form = call_format(ChatTemplate(loaded, tools_by_name([look]), {}))
    call = '<call>{"name": "look", "arguments": {"city": "Graz", "days": "2"}}</call>'
    assert form.read("<think>Hm. <call></think>Look." + call + call) == (
        Call("look", {"city": "Graz", "days": 2}),
        Call("look", {"city": "Graz", "days": 2}),
    )
    assert form.read("It is 4.") == ()
    assert form.read(HERMES) == ()
    for broken in ("<call>{oops</call>", "<call>3</call>", '<call>{"arguments": {}}</call>'):
        assert form.read(broken) == (Call(None, broken),)


def test_a_form_that_depends_on_types_is_refused():
    """Calls as code (LFM2, Gemma 4): without knowing the language nothing tells a number from a string."""
    tokenizer = type(family_tokenizer("chatml"))(
        tokenizer_object=family_tokenizer("chatml").backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + '(' }}{% for k, v in c.function.arguments.items() %}"
        "{{ k + '=' + v | tojson + ', ' * (not loop.last) }}{% endfor %}{{ ')' }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(TemplateError, match=r"writes a call as 'zqname\(zqfirst.*response_template"):
        call_format(ChatTemplate(tokenizer, tools_by_name([look]), {}))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=8), VALUES, max_size=4), min_size=1, max_size=3),
    st.text(max_size=9),
)
def test_any_arguments_are_read_back(arguments, words):
    written = [f"<tool_call>{json.dumps({'name': 'look', 'arguments': a})}</tool_call>" for a in arguments]
    read = ObjectCalls().read(words.replace("<", "") + "\n".join(written))
    assert [call.arguments for call in read] == arguments


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet='<tool_call>/{}":,name arguments look\n', max_size=60))
def test_no_text_is_an_error(text):
    for form in (ObjectCalls(), ObjectCalls("", "name", "parameters"), HeaderCalls("<tool_call>", "{")):
        for call in form.read("<tool_call>" + text):
            assert call.tool is None or isinstance(call.tool, str)
