"""Scaling laws: fit a form to a table of runs, with intervals, refusals and a record; compare architectures.

from recscale.scaling.laws import compare, fit, forms, optimum, record

law = fit(table, form="chinchilla", axes={"N": "dense_params", "D": "examples"}, target="logloss")
law.params, law.intervals, law.refusals, law.predict({"N": 1e6, "D": 1e8})
record(law), optimum(law, budget=1e18)
"""

from . import forms
from .comparing.compare import compare
from .fitting.fit import fit
from .fitting.law_fit import LawFit, Refused
from .fitting.optimum import optimum
from .fitting.record import record

__all__ = ["LawFit", "Refused", "compare", "fit", "forms", "optimum", "record"]
