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
log_linear           LL       y = a - b ln x
m4                   M4       (y - E) / (E0 - y)^a = A x^-c
bnsl                 BNSL     y = a + b x^-c0 prod_i (1 + (x/d_i)^(1/f_i))^(-c_i f_i)
repeated_data        RC       chinchilla (or another base) with D = U (1 + R* (1 - e^(-R/R*)))
moe_granularity      MOE-G    y = c + (g G^-gamma + a) N^-alpha + b D^-beta
moe_unified          MOE-U    ln y = a ln N + b ln Ehat + c ln N ln Ehat + d
moe_sparsity         MOE-S    y = e + a N^-alpha + b D^-beta + c s^-lambda + d s^-delta N^-gamma
auc                  AUC      t = S - A x^-alpha, t = 2 Phi^-1(AUC)^2
joint                JOINT    logloss = E + (v/2) A x^-alpha and t = S - A x^-alpha
gain                 GAIN     delta = c x^gamma (stored, never compared)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from . import auc as forms_auc
from . import experts as forms_moe
from . import one_axis as forms_one_axis
from . import power as forms_power
from .form import Family, Form, Linear, Parameter, Slot
from .power import SUM_COLUMNS

__all__ = [
    "Family",
    "Form",
    "Linear",
    "Parameter",
    "Slot",
    "SUM_COLUMNS",
    "describe",
    "get",
    "names",
    "with_real_floor",
]


def _sum(axes: Sequence[str] | None) -> Form:
    return forms_power.sum_form(tuple(axes or ("dense_params", "examples")))


def _kappa_sum(axes: Sequence[str] | None) -> Form:
    return forms_power.kappa_sum(
        tuple(a for a in axes or ("history_length", "memory_slots") if a not in ("N", "D", "x1", "x2"))
    )


def _joint(axes: Sequence[str] | None) -> Form:
    return forms_auc.joint(tuple(axes) if axes is not None and len(axes) > 1 else ("x",))


_BUILDERS: dict[str, Callable[..., Form]] = {
    "power": lambda axes: forms_power.power(),
    "power_offset": lambda axes: forms_power.power_offset(),
    "chinchilla": lambda axes: forms_power.chinchilla(),
    "chinchilla_tied": lambda axes: forms_power.chinchilla(tied=True),
    "kaplan": lambda axes: forms_power.kaplan(offset=False),
    "kaplan_offset": lambda axes: forms_power.kaplan(offset=True),
    "kappa": lambda axes: forms_power.kappa(),
    "kappa_tied": lambda axes: forms_power.kappa(tied=True),
    "sum": _sum,
    "kappa_sum": _kappa_sum,
    "log_linear": lambda axes: forms_one_axis.log_linear(),
    "m4": lambda axes: forms_one_axis.saturating(),
    "bnsl": lambda axes, breaks=1: forms_one_axis.broken(breaks),
    "repeated_data": lambda axes, base="chinchilla": forms_power.repeated_data(base),
    "moe_granularity": lambda axes: forms_moe.moe_granularity(),
    "moe_unified": lambda axes: forms_moe.moe_unified(),
    "moe_sparsity": lambda axes: forms_moe.moe_sparsity(),
    "auc": lambda axes: forms_auc.auc(),
    "joint": _joint,
    "gain": lambda axes: forms_one_axis.gain(),
}
_ALIASES = {
    "P0": "power",
    "P1": "power_offset",
    "LL": "log_linear",
    "C": "chinchilla",
    "C=": "chinchilla_tied",
    "K": "kaplan",
    "K+E": "kaplan_offset",
    "kappa=": "kappa_tied",
    "SUM": "sum",
    "KSUM": "kappa_sum",
    "M4": "m4",
    "BNSL": "bnsl",
    "RC": "repeated_data",
    "MOE-G": "moe_granularity",
    "MOE-U": "moe_unified",
    "MOE-S": "moe_sparsity",
    "AUC": "auc",
    "JOINT": "joint",
    "GAIN": "gain",
}


def names() -> tuple[str, ...]:
    """Readable ids of every registered form."""
    return tuple(_BUILDERS)


def get(form: str | Form, axes: Sequence[str] | None = None, **options) -> Form:
    """The form with this id or alias. `axes` names the slots of sum, kappa_sum and joint; options go to the
    form.

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
    """The form for metrics that may be 0 or negative: its floor is searched as a real number on plain
    residuals.

    Raises ValueError for a form that is only defined on positive metrics.
    """
    if form.target == "any" or form.id == "auc":
        return form
    if form.id == "power_offset":
        return forms_power.power_offset(real_floor=True)
    if form.id == "log_linear":
        return forms_one_axis.log_linear(real=True)
    if form.streams or not form.has_floor:
        return form
    raise ValueError(f"form {form.id} needs a positive metric; power_offset and log_linear take any")


def describe(form: str | Form, axes: Sequence[str] | None = None, **options) -> dict:
    """A form as plain data: equation, source, axes with units, parameters with role, unit and search range,
    validity, limits.
    """
    found = get(form, axes, **options)
    return {
        "id": found.id,
        "aliases": list(found.aliases),
        "equation": found.equation,
        "source": found.source,
        "axes": [{"slot": s.name, "column": s.column, "unit": s.unit, "valid": s.valid} for s in found.slots],
        "parameters": [
            {
                "name": p.name,
                "role": p.role,
                "unit": p.unit,
                "searched": p.searched,
                "range": [p.low, p.high],
                "range_of": p.scale,
                "meaning": p.meaning,
            }
            for p in found.parameters
        ],
        "valid": found.valid,
        "limits": found.limits,
        "nested_in": list(found.nested_in),
        "floor": found.floor,
        "note": found.note,
    }
