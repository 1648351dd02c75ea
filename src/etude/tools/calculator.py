"""A calculator for models: safe arithmetic, without `eval`.

Length and characters are checked before the parser sees the text, and every result before the next
operation, so no expression takes long or much memory.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from etude.errors import ToolError

MAX_LENGTH = 256  # characters; bounds nesting too
MAX_BITS = 1024  # of an integer: about 308 digits, as far as floats reach

Number = int | float

_ALLOWED = re.compile(r"[0-9eE.+\-*/%() ]+")
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")  # 06 is 6; 1.05 keeps its zero


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Knows + - * / // % ** and parentheses, with Python's precedence. Integers are exact, and a whole
    number is printed without a fraction: 10/2 is "5", 7/2 is "3.5".

    Args:
        expression: for example "738*46+19".

    Returns:
        The result.
    """
    text = " ".join(expression.split())
    if len(text) > MAX_LENGTH:
        raise ToolError(f"the expression has {len(text)} characters; expected at most {MAX_LENGTH}")
    if not _ALLOWED.fullmatch(text):
        raise ToolError(f"can't read {text!r}; expected numbers, + - * / // % ** and parentheses")
    try:
        tree = ast.parse(_LEADING_ZEROS.sub("", text), mode="eval")
    except SyntaxError as error:
        raise ToolError(f"can't read {text!r}; expected an arithmetic expression") from error
    try:
        return _show(_evaluate(tree.body))
    except ZeroDivisionError as error:
        raise ToolError(f"division by zero in {text!r}") from error
    except OverflowError as error:
        raise ToolError(f"the result of {text!r} is too large") from error


def _evaluate(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value):
            return _bounded(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_evaluate(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_evaluate(left), _evaluate(right)))
    raise ToolError(f"can't read {ast.unparse(node)!r}; expected numbers, + - * / // % ** and parentheses")


def _bounded(value: Any) -> Number:
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    if value.bit_length() > MAX_BITS if isinstance(value, int) else not math.isfinite(value):
        raise OverflowError
    return value


def _divide(a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int) and b != 0 and a % b == 0:
        return a // b  # exact where a float would round
    return a / b


def _power(a: Number, b: Number) -> Any:
    # A lower bound of the result's size, before it is computed.
    if isinstance(a, int) and isinstance(b, int) and b > 0 and (a.bit_length() - 1) * b > MAX_BITS:
        raise OverflowError
    return a**b


_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


def _show(value: Number) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return repr(value)
