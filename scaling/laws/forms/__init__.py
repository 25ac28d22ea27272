"""Forms of scaling laws, by name: `forms.get("kappa")`, `forms.names()`, `forms.describe("chinchilla")`.

What a form of one's own is made of is here too: a callable `(axes, **options) -> Form`, named in a fit by its address
`package.module:attribute`, or declared in the entry-point group `recscale.forms`.
"""

from .form import (
    ABSENT,
    DATA,
    ONE,
    SIZE,
    Axes,
    Family,
    Form,
    Linear,
    Parameter,
    Slot,
    coefficient,
    exponent,
    floor_parameter,
)
from .registry import describe, full_name, get, names

__all__ = [
    "ABSENT",
    "DATA",
    "ONE",
    "SIZE",
    "Axes",
    "Family",
    "Form",
    "Linear",
    "Parameter",
    "Slot",
    "coefficient",
    "describe",
    "exponent",
    "floor_parameter",
    "full_name",
    "get",
    "names",
]
