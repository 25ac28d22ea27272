"""The registry of forms: `get("kappa")`, `names()`, and readable ids with their short aliases.

Form                 alias    equation
power                P0       y = A x^-alpha
power_offset         P1       y = E + A x^-alpha
chinchilla           C        y = E + A N^-alpha + B D^-beta
chinchilla_tied      C=       chinchilla with alpha = beta
kaplan               K        y = [(A N^-alpha)^(1/beta) + (B D^-beta)^(1/beta)]^beta
kaplan_offset        K+E      E + kaplan
kappa                         y = E + [(A N^-alpha)^kappa + (B D^-beta)^kappa]^(1/kappa)
kappa_tied           kappa=   kappa with alpha = beta
sum                  SUM      y = E + sum_j A_j x_j^-alpha_j
kappa_sum            KSUM     E + kappa(N, D) + sum over further axes
repeated_data        RC       chinchilla (or another base) with D = U (1 + R* (1 - e^(-R/R*)))
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from . import forms_power as power_forms
from .forms_base import Family, Form, Linear, Parameter, Slot

__all__ = ["Family", "Form", "Linear", "Parameter", "Slot", "get", "names"]


def _sum(axes: Sequence[str] | None) -> Form:
    return power_forms.sum_form(tuple(axes or ("dense_params", "examples")))


def _kappa_sum(axes: Sequence[str] | None) -> Form:
    return power_forms.kappa_sum(tuple(a for a in axes or ("history_length", "memory_slots") if a not in ("N", "D", "x1", "x2")))


_BUILDERS: dict[str, Callable[..., Form]] = {
    "power": lambda axes: power_forms.power(),
    "power_offset": lambda axes: power_forms.power_offset(),
    "chinchilla": lambda axes: power_forms.chinchilla(),
    "chinchilla_tied": lambda axes: power_forms.chinchilla(tied=True),
    "kaplan": lambda axes: power_forms.kaplan(offset=False),
    "kaplan_offset": lambda axes: power_forms.kaplan(offset=True),
    "kappa": lambda axes: power_forms.kappa(),
    "kappa_tied": lambda axes: power_forms.kappa(tied=True),
    "sum": _sum,
    "kappa_sum": _kappa_sum,
    "repeated_data": lambda axes, base="chinchilla": power_forms.repeated_data(base),
}
_ALIASES = {"P0": "power", "P1": "power_offset", "C": "chinchilla", "C=": "chinchilla_tied", "K": "kaplan",
            "K+E": "kaplan_offset", "kappa=": "kappa_tied", "SUM": "sum", "KSUM": "kappa_sum", "RC": "repeated_data"}  # fmt: skip


def names() -> tuple[str, ...]:
    """Readable ids of every registered form."""
    return tuple(_BUILDERS)


def get(form: str | Form, axes: Sequence[str] | None = None, **options) -> Form:
    """The form with this id or alias. `axes` names the slots of sum, kappa_sum and joint; options go to the form.

    Raises ValueError naming the nearest ids when there is no such form.
    """
    if isinstance(form, Form):
        return form
    name = _ALIASES.get(form, form)
    if name not in _BUILDERS:
        near = difflib.get_close_matches(form, [*_BUILDERS, *_ALIASES], n=3, cutoff=0.3)
        raise ValueError(f"no form {form!r}; nearest: {', '.join(near) or 'none'}; all: {', '.join(_BUILDERS)}")
    return _BUILDERS[name](axes, **options)


def with_real_floor(form: Form) -> Form:
    """The form for metrics that may be 0 or negative: its floor is searched as a real number on plain residuals.

    Raises ValueError for a form that is only defined on positive metrics.
    """
    if form.target == "any" or form.id == "auc":
        return form
    if form.id == "power_offset":
        return power_forms.power_offset(real_floor=True)
    if not form.has_floor:
        return form
    raise ValueError(f"form {form.id} needs a positive metric; power_offset and log_linear take any")
