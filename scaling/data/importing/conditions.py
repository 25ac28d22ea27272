"""Conditions of schema files, `is_click == 1 and tab in [1, 2]`, as SQL that never fails on a value.

    condition  = comparison {"and" comparison}
    comparison = column (== | != | < | <= | > | >=) literal | column in [..]

A number is compared with the column read as a number, a text with the column as text; a value that cannot be read so
gives NULL, which is neither true nor false.
"""

from __future__ import annotations

import ast
import re

_COMPARISON = re.compile(r"\s*(?P<column>\w+)?\s*(?P<operator>==|!=|<=|>=|<|>|\bin\b)\s*(?P<literal>.+?)\s*")


class ConditionError(ValueError):
    """A condition that cannot be read; names the part."""


def columns_of(condition: str, column: str | None = None) -> list[str]:
    """Columns a condition reads; `column` as in `to_sql`."""
    return [name for name, _, _ in _parse(condition, column)]


def to_sql(condition: str, column: str | None = None) -> str:
    """The SQL of a condition. `column`: what a comparison without a column is about, as in `>= 4`.

    Raises:
        ConditionError: not of the form above.
    """
    return "(" + " AND ".join(_comparison(*part) for part in _parse(condition, column)) + ")"


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def text(value: object) -> str:
    """A text in SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def _parse(condition: str, column: str | None) -> list[tuple[str, str, object]]:
    parts = []
    for piece in re.split(r"\band\b", condition):
        match = _COMPARISON.fullmatch(piece)
        name = match and (match["column"] or column)
        if not match or not name:
            raise ConditionError(
                f"cannot read {piece.strip()!r} of the condition {condition!r}; write column == value, "
                "joined by `and` (operators ==, !=, <, <=, >, >=, in [..])"
            )
        try:
            literal = ast.literal_eval(match["literal"])
        except (ValueError, SyntaxError) as error:
            raise ConditionError(f"{match['literal']!r} in {condition!r} is no number and no quoted text") from error
        if (match["operator"] == "in") != isinstance(literal, list | tuple):
            raise ConditionError(f"`in` takes a list and the other operators one value, found {piece.strip()!r}")
        parts.append((name, match["operator"], literal))
    return parts


def _comparison(column: str, operator: str, literal: object) -> str:
    values = list(literal) if isinstance(literal, list | tuple) else [literal]
    numeric = all(isinstance(value, int | float) for value in values)  # True and False are 1 and 0
    side = f"TRY_CAST({quoted(column)} AS DOUBLE)" if numeric else f"CAST({quoted(column)} AS VARCHAR)"
    shown = [repr(float(value)) if numeric else text(value) for value in values]  # pyright: ignore[reportArgumentType]  # checked to be numbers
    if operator == "in":
        return f"{side} IN ({', '.join(shown)})"
    return f"{side} {'=' if operator == '==' else operator} {shown[0]}"
