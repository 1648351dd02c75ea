import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import ToolError
from etude.tools.calculator import MAX_LENGTH, calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("738*46+19", "33967"),
        ("06", "6"),
        ("007 + 10 + 00", "17"),
        ("1.05 + 06.5", "7.55"),
        ("100 - 1e-05*0", "100"),
        ("10/2", "5"),
        ("7/2", "3.5"),
        ("2.5*2", "5"),
        ("1/3", "0.3333333333333333"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("-2**2", "-4"),
        ("2**3**2", "512"),
        ("2**-1", "0.5"),
        ("1**10**100", "1"),
        ("-(3 + 4) * +2", "-14"),
        (" 1\n +\t2 ", "3"),
        ("0*-1.0", "0"),
        ("10.0**16", "1e+16"),
        ("2**1023", str(2**1023)),
        ("10**40/10**20", str(10**20)),  # a float would round
    ],
)
def test_results(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1/0", "division by zero in '1/0'"),
        ("0**-5000", "division by zero"),
        ("5 % 0", "division by zero"),
        ("2**1024", "too large"),
        ("9**9**9**9", "too large"),
        ("99999999**99999999", "too large"),
        ("1e200*1e200", "too large"),
        ("1e999", "too large"),
        ("10.0**1000", "too large"),
        ("10**300/3/10**-300", "too large"),
        ("(-8)**0.5", "not a real number"),
        ("", "can't read"),
        ("2 +", "can't read"),
        ("(1)(2)", "can't read"),
        ("1, 2", "can't read"),
        ("e", "can't read"),
        ("x = 2", "can't read"),
        ("__import__('os')", "can't read"),
        ("1_000", "can't read"),
        ("1\x00", "can't read"),
        ("٣", "can't read"),
        ("1+" * 200 + "1", "at most 256"),
        ("(" * 250, "can't read"),
    ],
)
def test_refused(expression, message):
    with pytest.raises(ToolError, match=message):
        calculator(expression)


def test_the_deepest_expression_is_evaluated():
    assert calculator("-" * (MAX_LENGTH - 1) + "1") == "-1"
    assert calculator("(" * 100 + "1" + ")" * 100) == "1"


INTEGERS = st.integers(-(10**12), 10**12)


@st.composite
def integer_expressions(draw):
    """(what a model writes, what Python reads): the same but for leading zeros."""
    number = draw(st.integers(0, 10**6))
    ours, python = "0" * draw(st.integers(0, 3)) + str(number), str(number)
    for _ in range(draw(st.integers(0, 6))):
        operator = draw(st.sampled_from(["+", "-", "*", "//", "%"]))
        other = draw(st.integers(1, 10**4))
        zeros = "0" * draw(st.integers(0, 3))
        ours, python = f"{ours}{operator}{zeros}{other}", f"{python}{operator}{other}"
        if draw(st.booleans()):
            ours, python = f"-({ours})", f"-({python})"
    return ours, python


@given(integer_expressions())
def test_integers_are_pythons(pair):
    ours, python = pair
    assert calculator(ours) == str(eval(python))


@given(INTEGERS, INTEGERS.filter(bool))
def test_division_is_exact_where_it_can_be(a, b):
    result = calculator(f"({a})/({b})")
    assert result == str(a // b) if a % b == 0 else float(result) == a / b


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_floats_are_pythons(a, b):
    assert float(calculator(f"({a!r})*({b!r})")) == a * b


@given(st.text("0123456789eE.+-*/%() ", max_size=60))
def test_any_text_gives_a_number_or_a_tool_error(text):
    try:
        result = calculator(text)
    except ToolError:
        return
    assert float(result) == float(result)
