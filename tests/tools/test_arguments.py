import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import ToolError
from etude.tools.arguments import read_arguments


def schema(required, **properties):
    types = {name: {"type": kind} if kind else {} for name, kind in properties.items()}
    return {"type": "object", "properties": types, "required": required}


ONE = schema(["text"], text="string")
TWO = schema(["a", "b"], a="integer", b="number")
OPTIONAL = schema(["query"], query="string", limit="integer")


@pytest.mark.parametrize(
    ("kind", "query", "value"),
    [
        ("string", " 06 ", " 06 "),
        (None, "06", "06"),
        ("integer", " 06 ", 6),
        ("number", "2.5", 2.5),
        ("boolean", "True", True),
        ("boolean", "no", False),
        ("array", "[1, 2]", [1, 2]),
        ("object", '{"a": 1}', {"a": 1}),
        (["integer", "number"], "2.5", 2.5),
        (["integer", "string"], "6", "6"),
        ("image", "x.png", "x.png"),
    ],
)
def test_the_query_becomes_the_type_of_its_parameter(kind, query, value):
    read = read_arguments(query, schema(["x"], x=kind))
    assert read == {"x": value}
    assert type(read["x"]) is type(value)


@pytest.mark.parametrize(
    ("kind", "query"), [("integer", "six"), ("number", ""), ("boolean", "maybe"), ("array", "[1")]
)
def test_a_query_of_the_wrong_type(kind, query):
    with pytest.raises(ToolError, match=f"'x' is '.*'; expected {kind}"):
        read_arguments(query, schema(["x"], x=kind))


def test_a_query_finds_its_parameter():
    assert read_arguments("cats", OPTIONAL) == {"query": "cats"}
    assert read_arguments("3", schema([], n="integer", m="integer")) == {"n": 3}
    assert read_arguments(" ", schema([])) == {}
    assert read_arguments("raw", {}) == "raw"
    with pytest.raises(ToolError, match="expected no arguments"):
        read_arguments("now", schema([]))


def test_json_text_is_named_arguments_where_there_are_several():
    assert read_arguments(' {"a": 1, "b": 2.5}', TWO) == {"a": 1, "b": 2.5}
    assert read_arguments('{"query": "cats", "limit": 3}', OPTIONAL) == {"query": "cats", "limit": 3}
    # Other names: the text is what is asked for. One parameter: it always is.
    assert read_arguments('{"cats": 3}', OPTIONAL) == {"query": '{"cats": 3}'}
    assert read_arguments('{"text": "cats"}', ONE) == {"text": '{"text": "cats"}'}
    assert read_arguments('{"x": 1}', {**schema([]), "additionalProperties": True}) == {"x": 1}


@pytest.mark.parametrize("query", ["1, 2", '{"a": 1', "[1, 2]", "{" * 100_000])
def test_several_parameters_need_json(query):
    with pytest.raises(ToolError, match=r"expected a JSON object with 'a' \(integer\), 'b' \(number\)"):
        read_arguments(query, TWO)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": 1}, r"missing argument 'b'; expected 'a' \(integer\), 'b' \(number\)"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "unknown arguments 'c', 'd'"),
        ({"a": "1", "b": 2}, "'a' is '1'; expected integer"),
        ({"a": True, "b": 2}, "'a' is True; expected integer"),
        ({"a": 1.5, "b": 2}, "'a' is 1.5; expected integer"),
        ({"a": None, "b": 2}, "'a' is None; expected integer"),
        ({"a": float("inf"), "b": 2}, "'a' is inf; expected integer"),
        ([1, 2], "expected named arguments"),
    ],
)
def test_named_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ToolError, match=message):
        read_arguments(arguments, TWO)


def test_a_whole_float_is_an_integer():
    assert read_arguments({"a": 3.0, "b": 1}, TWO) == {"a": 3, "b": 1}
    assert type(read_arguments({"a": 3.0, "b": 1}, TWO)["a"]) is int


def test_enumerations_alternatives_and_null():
    choice = {"properties": {"x": {"type": "string", "enum": ["tea", "coffee"], "nullable": True}}}
    assert read_arguments({"x": "tea"}, choice) == {"x": "tea"}
    assert read_arguments({"x": None}, choice) == {"x": None}
    with pytest.raises(ToolError, match="expected one of 'tea', 'coffee'"):
        read_arguments("water", choice)
    either = {"properties": {"x": {"anyOf": [{"type": "integer"}, {"type": "array"}]}}}
    assert read_arguments({"x": [1]}, either) == {"x": [1]}
    with pytest.raises(ToolError, match="expected integer or array"):
        read_arguments({"x": "a"}, either)
    anything = {"properties": {"x": {"anyOf": [{"type": "integer"}, {}]}}}
    assert read_arguments({"x": "a"}, anything) == {"x": "a"}


def test_open_schemas_take_other_names():
    assert read_arguments({"text": "a", "z": 1}, {**ONE, "additionalProperties": True}) == {
        "text": "a",
        "z": 1,
    }
    assert read_arguments({"z": 1}, {}) == {"z": 1}


@given(st.text(), st.sampled_from([ONE, TWO, OPTIONAL]))
def test_any_query_fits_or_is_a_tool_error(query, of):
    try:
        read = read_arguments(query, of)
    except ToolError:
        assert of is TWO
        return
    assert read_arguments(read, of) == read
