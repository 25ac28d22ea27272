"""Scaling laws: fit a form to a table of runs, with intervals, refusals and a record; compare architectures.

from recscale.scaling.laws import fit, compare, forms

law = fit(table, form="chinchilla", axes={"N": "dense_params", "D": "examples"}, target="logloss")
law.params, law.intervals, law.refusals, law.predict({"N": 1e6, "D": 1e8}), law.to_json()
"""

from importlib import import_module

from .fitting.fit import LawFit, Refused, fit
from .forms import registry as forms

# Loaded on first use: they build on `fit`, so importing them here would be a cycle.
_LAZY = {"compare": "comparing.compare"}

__all__ = ["LawFit", "Refused", "compare", "fit", "forms"]


def __getattr__(name: str):
    if name in _LAZY:
        # Importing the submodule binds its name here to the module; the public name is the function in it.
        globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
