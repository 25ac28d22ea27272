"""The run-time type checker of the tests: beartype on every function that says what arrays it takes or returns.

An int is a float, as it is for static type checkers. Functions without arrays are left to the static one, and as they
are: wrapping each of them would make planning and sizing several times slower.
"""

import re
from collections.abc import Callable
from typing import Any

import beartype

_ARRAYS = re.compile(r"\b(Float|Int|UInt|Integer|Bool|Num|Real|Inexact|Complex|Shaped|Key|PRNGKeyArray)\d*\[")

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def of_arrays_only(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """`jaxtyping.jaxtyped` that returns functions and classes unchanged if no annotation of theirs is an array's."""

    def decorator(**options: Any) -> Callable[..., Any]:
        wrap = jaxtyped(**options)

        def decorated(target: Any) -> Any:
            hints = getattr(target, "__annotations__", {}).values()
            return wrap(target) if any(_ARRAYS.search(str(hint)) for hint in hints) else target

        return decorated

    return decorator
