"""y = A x^-alpha, written from the parts a form is made of."""

import numpy as np

from recscale.scaling.laws.forms.form import ONE, Family, Form, Linear, coefficient, exponent


def bare_power(axes=None):
    def value(theta, axes, xp):
        return xp.exp(theta[0] - xp.exp(theta[1]) * axes[:, 0])

    return Form(
        "bare_power", (), "y = A x^-alpha", "made up", (ONE,), (coefficient("A", "x", "alpha"), exponent("alpha", "x")),
        Family("bare_power", ("A", "alpha"), value),
        Linear(("alpha",), ("A",), lambda e, axes: [np.exp(-e["alpha"] * axes[:, 0])], (False,)),
        limits="0 as x -> infinity", min_distinct=3,
    )  # fmt: skip
