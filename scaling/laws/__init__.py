"""Scaling laws: fit a form to a table of runs, with intervals, refusals and a record; compare architectures.

from recscale.scaling.laws import compare, fit, forms, optimum, record

law = fit(table, form="chinchilla", axes={"N": "dense_params", "D": "examples"}, target="logloss")
law.params, law.intervals, law.refusals, law.predict({"N": 1e6, "D": 1e8})
record(law), optimum(law, budget=1e18)

Names are listed in `__init__.pyi` and loaded on first use: a fit does not wait for what compares architectures.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
