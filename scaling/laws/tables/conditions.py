"""Conditions on the rows of a run table, as `--where` takes them: comparisons joined by and, or, not and in.

A condition is parsed as Python and walked node by node. Calls, subscripts and attributes of objects are not part of the
language, so that a condition reaches the columns of the table and nothing else. A dotted name is the column of that
name; a name with other characters stands in back-ticks: `learning rate` > 1e-3.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from recscale.pallas_kernels import names

_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda left, right: left.isin(right),
    ast.NotIn: lambda left, right: ~left.isin(right),
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_QUOTED = re.compile(r"`([^`]+)`")
_LANGUAGE = "it takes columns, numbers and texts with < <= > >= == != in, + - * /, joined by and, or, not"


def rows_where(table: pd.DataFrame, where: str) -> np.ndarray:
    """Which rows meet the condition, bool [n]; where a value is missing, a comparison is not met.

    Raises ValueError naming what is wrong: no such column, something outside the language, or no condition at all.
    """
    quoted: list[str] = []

    def stand_in(match: re.Match) -> str:
        quoted.append(match[1])
        return f"_quoted_{len(quoted) - 1}_"

    def column(name: str) -> pd.Series:
        found = re.fullmatch(r"_quoted_(\d+)_", name)
        name = quoted[int(found[1])] if found else name
        if name not in table.columns:
            hint = "" if found else "; a name with spaces or signs stands in back-ticks, as in `learning rate` > 1e-3"
            raise ValueError(f"no column {name!r}{names.nearest(name, map(str, table.columns))}{hint}")
        return table[name]

    try:
        tree = ast.parse(_QUOTED.sub(stand_in, where).strip(), mode="eval")
        met = _value(tree.body, column)
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
        told = f"{error.msg}; {_LANGUAGE}" if isinstance(error, SyntaxError) else error
        raise ValueError(f"where={where!r} cannot be evaluated on this table: {told}") from error
    if not _is_condition(met):
        raise ValueError(f'where={where!r} is not a condition on the rows, such as "dense_params > 1e4"')
    return met.astype("boolean").fillna(False).to_numpy(bool)


def _value(node: ast.expr, column: Callable[[str], pd.Series]) -> Any:
    """A column, a constant, a list of constants, or the condition that a node stands for."""
    value = functools.partial(_value, column=column)
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return node.value
        case ast.Name() | ast.Attribute():
            return column(ast.unparse(node))
        case ast.List() | ast.Tuple() | ast.Set():
            return [value(element) for element in node.elts]
        case ast.UnaryOp(op=ast.USub()):
            return -value(node.operand)
        case ast.UnaryOp(op=ast.Not() | ast.Invert()):
            return ~_condition(node.operand, value)
        case ast.BoolOp():
            joined = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return functools.reduce(joined, [_condition(part, value) for part in node.values])
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            joined = operator.and_ if isinstance(node.op, ast.BitAnd) else operator.or_
            return joined(_condition(node.left, value), _condition(node.right, value))
        case ast.BinOp() if type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        case ast.Compare():
            sides = [value(side) for side in (node.left, *node.comparators)]
            pairs = zip(node.ops, sides, sides[1:], strict=False)
            return functools.reduce(operator.and_, [_compared(*pair) for pair in pairs])
    raise ValueError(f"{ast.unparse(node)!r} is not part of a condition; {_LANGUAGE}")


def _compared(op: ast.cmpop, left: Any, right: Any) -> pd.Series:
    """One comparison. Raises ValueError where one side is text and the other a number: that is never met."""
    if type(op) not in _COMPARISONS or not (isinstance(left, pd.Series) or isinstance(right, pd.Series)):
        raise ValueError(f"a comparison needs a column on one side; {_LANGUAGE}")
    if isinstance(op, ast.In | ast.NotIn) != isinstance(right, list) or isinstance(left, list):
        raise ValueError("a column is `in` a list: dataset in ['a', 'b']")
    kinds = [_is_text(side) for side in (left, *(right if isinstance(right, list) else [right]))]
    if len(set(kinds) - {None}) > 1:
        named = next(side.name for side in (left, right) if isinstance(side, pd.Series))
        one, other = ("texts", "a number") if kinds[0] else ("numbers", "a text")
        raise ValueError(f"column {named!r} holds {one} and is compared with {other}")
    return _COMPARISONS[type(op)](left, right).astype("boolean")


def _is_text(side: Any) -> bool | None:
    """Whether a side of a comparison is text; None for a column of dates (they compare with texts) or of nothing."""
    if not isinstance(side, pd.Series):
        return isinstance(side, str)
    kind = pd.api.types.infer_dtype(side, skipna=True)
    return None if kind == "empty" or kind.startswith("date") else kind in ("string", "categorical")


def _condition(node: ast.expr, value: Callable[[ast.expr], Any]) -> pd.Series:
    found = value(node)
    if not _is_condition(found):
        raise ValueError(f"{ast.unparse(node)!r} is not a condition, and `and`, `or`, `not` join conditions")
    return found.astype("boolean")


def _is_condition(found: Any) -> bool:
    """Whether a value says yes or no of every row; gaps are allowed."""
    return isinstance(found, pd.Series) and pd.api.types.infer_dtype(found, skipna=True) == "boolean"
