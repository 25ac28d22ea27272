"""The run-time type checker of the tests: beartype on every function that says what arrays it takes or returns.

An int is a float, as it is for static type checkers. All else is left to the static one.
"""

import re
from collections.abc import Callable
from typing import Any

import beartype

_ARRAYS = re.compile(r"\b(Float|Int|UInt|Integer|Bool|Num|Real|Inexact|Complex|Shaped|Key|PRNGKeyArray)\b")
_CHECK = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, checked at every call if one of its annotations is an array's."""
    hints = getattr(function, "__annotations__", {}).values()
    return _CHECK(function) if any(_ARRAYS.search(str(hint)) for hint in hints) else function
