"""The registry of forms by name: `get("kappa")`, `names()`, `describe("chinchilla")`.

A form is known by its readable id, by the short aliases it declares itself (`recscale fit --forms` lists both with
their equations), by the name under which another distribution declares it in the entry-point group `recscale.forms`,
or by its address, `package.module:attribute`. Behind each name is a callable `(axes, **options) -> Form`; `axes` are
the names of the call's axes or None, and most forms have their own and ignore it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

from recscale.pallas_kernels import names as by_name

from .form import Form

GROUP = "recscale.forms"
# What is fitted where no form is asked for, in the terminal, in figures and on pages alike.
ONE_AXIS, SEVERAL_AXES = "power_offset", "chinchilla"
_FORMS = {
    name: f"recscale.scaling.laws.forms.{address}"
    for name, address in {
        "power": "power:power",
        "power_offset": "power:power_offset",
        "chinchilla": "power:chinchilla",
        "chinchilla_tied": "power:chinchilla_tied",
        "kaplan": "power:kaplan",
        "kaplan_offset": "power:kaplan_offset",
        "kappa": "power:kappa",
        "kappa_tied": "power:kappa_tied",
        "gamma": "power:gamma",
        "trunk": "trunk:trunk",
        "farseer": "size_dependent:farseer",
        "sum": "power:sum_form",
        "kappa_sum": "power:kappa_sum",
        "log_linear": "one_axis:log_linear",
        "m4": "one_axis:saturating",
        "bnsl": "one_axis:broken",
        "repeated_data": "power:repeated_data",
        "moe_granularity": "experts:moe_granularity",
        "moe_unified": "experts:moe_unified",
        "moe_sparsity": "experts:moe_sparsity",
        "auc": "auc:auc",
        "joint": "auc:joint",
        "gain": "one_axis:gain",
    }.items()
}


def names() -> tuple[str, ...]:
    """Readable ids of every registered form, those that other distributions bring last."""
    return tuple(by_name.available(GROUP, _FORMS))


def usual(axes: Collection[str] | str | None) -> str:
    """The form where none is asked for: that of one axis where one is named."""
    return ONE_AXIS if isinstance(axes, str) or (axes is not None and len(axes) == 1) else SEVERAL_AXES


def full_name(name: str) -> str:
    """The readable id behind a short alias of a form of this package; any other name as it is."""
    return name if name in _FORMS else _aliases().get(name, name)


def get(form: str | Form, axes: Sequence[str] | None = None, **options) -> Form:
    """The form with this id, alias or address. `axes` names the slots of sum, kappa_sum and joint; options go to the
    form.

    Raises ValueError naming the nearest id when there is no such form, or when what is found makes no form.
    """
    if isinstance(form, Form):
        return form
    build = by_name.load(GROUP, full_name(form), _FORMS, "form")
    found = build(None if axes is None else tuple(axes), **options)
    if not isinstance(found, Form):
        raise ValueError(f"form {form!r} is made by {build!r}, which returned {found!r}, expected a Form")
    return found


@cache
def _aliases() -> dict[str, str]:
    return {alias: name for name in _FORMS for alias in get(name).aliases}


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
