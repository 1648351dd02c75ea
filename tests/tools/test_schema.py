import functools
import math

import pytest
from transformers.utils import get_json_schema

from etude.errors import ToolError
from etude.tools.schema import signature_of


def weather(city: str, days: int = 1) -> str:
    """Forecast the weather.

    It may be wrong.

    Args:
        city: name of the city
        days: how many days ahead
    """
    return f"{city} {days}"


class SearchTool:
    description = "Looks things up."

    def __call__(self, query: str) -> str:
        """Ignored.

        Args:
            query: what to look for
        """
        return query


class Varargs:
    """Takes whatever comes."""

    def __call__(self, *args, sanitize=False, **kwargs):
        return str(args)


def test_documented_functions_are_described_by_transformers():
    signature = signature_of(weather)
    expected = get_json_schema(weather)["function"]
    assert signature.schema == expected["parameters"]
    assert signature.schema["properties"]["days"] == {"type": "integer", "description": "how many days ahead"}
    assert signature.description == expected["description"]
    assert signature.positional == ()


def test_an_object_is_described_by_its_own_description_and_call():
    signature = signature_of(SearchTool())
    assert signature.description == "Looks things up."
    assert signature.schema["properties"] == {"query": {"type": "string", "description": "what to look for"}}


def test_undocumented_parameters_keep_their_types():
    def area(width: float, height: float = 1.0, unit=None):
        """Area of a rectangle."""

    signature = signature_of(area)
    assert signature.description == "Area of a rectangle."
    assert signature.schema == {
        "type": "object",
        "properties": {"width": {"type": "number"}, "height": {"type": "number"}, "unit": {}},
        "required": ["width"],
    }


def test_half_a_documentation_is_not_an_error():
    def half(a: int, b: int):
        """Half.

        Args:
            a: the first
        """

    assert signature_of(half).schema["properties"] == {"a": {"type": "integer"}, "b": {"type": "integer"}}


def test_annotations_for_the_type_checker_only_are_left_open():
    def lazy(a: "Missing", b: "int"):  # noqa: F821
        """Lazy.

        Args:
            a: one
            b: two
        """

    assert signature_of(lazy).schema["properties"] == {"a": {}, "b": {}}


def test_bad_choices_name_the_function():
    def drink(beverage: str):
        """Drink.

        Args:
            beverage: what (choices: [tea])
        """

    with pytest.raises(ToolError, match="drink has choices that are not JSON"):
        signature_of(drink)


def test_no_parameters():
    def today():
        """What day it is."""

    assert signature_of(today).schema == {"type": "object", "properties": {}, "required": []}


@pytest.mark.parametrize("function", [max, lambda *args: args])
def test_what_tells_nothing_takes_one_string(function):
    signature = signature_of(function)
    assert signature.schema["properties"] == {"query": {"type": "string"}}
    assert signature.schema["required"] == ["query"]
    assert signature.positional == ("query",)


def test_open_keyword_arguments():
    signature = signature_of(Varargs())
    assert signature.description == "Takes whatever comes."
    assert signature.schema["additionalProperties"] is True
    assert signature.schema["required"] == []
    assert signature.positional == ("query",)


def test_positional_only_parameters_are_required():
    def power(base, exponent=2, /):
        return base**exponent

    assert signature_of(power).schema["required"] == ["base", "exponent"]
    assert signature_of(power).positional == ("base", "exponent")
    assert signature_of(math.sqrt).positional == ("x",)


def test_a_partial_hides_what_it_fixes():
    signature = signature_of(functools.partial(weather, days=3))
    assert signature.schema["properties"] == {"city": {"type": "string"}}
    assert signature.description == "Forecast the weather."
