"""Farseer's form, in which coefficient and exponent of the data depend on the size (arXiv 2506.10972):

y = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) D^(-exp(a1 N^alpha + b1))

That is a level U(N), a coefficient B(N) and an exponent A(N) of the data, each the exponential of a power of the size.
A power a N^p + b is searched as its value at the centre, its slope there in ln N, and p, which are far less correlated:
a N^p + b = value + slope (e^(p u) - 1) / p with u = ln N - mean ln N; p = 0 is a power law in N. D enters as it is: its
exponent depends on N, so that no other centre of D gives the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
from scipy import optimize

from .form import DATA, SIZE, UNCHECKED, Axes, Family, Form, Parameter

# (constant, slope, power) of ln U, ln B and ln A in the paper's letters, and what they describe.
_PARTS = (
    (("b3", "a3", "gamma"), "level U"),
    (("b2", "a2", "beta"), "coefficient B of the data"),
    (("b1", "a1", "alpha"), "exponent A of the data"),
)
_POWERS = (-0.3, 0.05)  # of the starts


def _stretched(value, slope, power, u, xp):
    """value + slope (e^(power u) - 1) / power, and its limit value + slope u at power 0."""
    near = xp.abs(power) < 1e-8
    safe = xp.where(near, 1.0, power)
    return value + slope * xp.where(near, u, xp.expm1(safe * u) / safe)


def _raw(centred: Mapping[str, np.ndarray], log_centre: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The printed constants: of each part a N^p + b."""
    found = {}
    for (b, a, p), _ in _PARTS:
        value, slope, power = (np.asarray(centred[name]) for name in (b, a, p))
        found |= {a: slope / power * np.exp(-power * log_centre["N"]), b: value - slope / power, p: power}
    return found


def _starts(axes: np.ndarray, y: np.ndarray, _: np.random.Generator) -> dict[str, np.ndarray]:
    """The best sums T N^-a + S D^-b over a grid of exponents: the level falls with N, the rest depends on D alone."""
    n, d = axes[:, 0], np.log(axes[:, 1])
    centre, found = d.mean(), []
    for a, b in product((0.0, 0.05, 0.1, 0.2), (0.15, 0.3, 0.45, 0.6)):
        design = np.stack([np.exp(-a * n), np.exp(-b * (d - centre))], axis=1) / y[:, None]
        (top, data), miss = optimize.nnls(design, np.ones(len(y)))
        found.append((miss, max(top, 1e-3 * y.min()), a, max(data, 1e-3 * y.min()), b))
    grid = np.repeat(np.array(sorted(found)[:4]), len(_POWERS), axis=0)
    zero, power = np.zeros(len(grid)), np.tile(_POWERS, len(grid) // len(_POWERS))
    level = {"b3": np.log(grid[:, 1]), "a3": -grid[:, 2], "gamma": power}
    coefficient = {"b2": np.log(grid[:, 3]) + grid[:, 4] * centre, "a2": zero, "beta": power}
    return level | coefficient | {"b1": np.log(grid[:, 4]), "a1": zero, "alpha": power}


def _value(theta, axes, xp):
    b3, a3, p3, b2, a2, p2, b1, a1, p1 = theta
    parts = ((b3, a3, p3), (b2, a2, p2), (b1, a1, p1))
    level, coefficient, exponent = (_stretched(b, a, p, axes[:, 0], xp) for b, a, p in parts)
    return xp.exp(level) + xp.exp(coefficient - xp.exp(exponent) * xp.log(axes[:, 1]))


@cache
def farseer(axes: Axes = None) -> Form:
    """y = U(N) + B(N) D^-A(N), each exp(a N^p + b): nine parameters. U(N) is the loss with unlimited data."""
    parameters = []
    for (b, a, p), what in _PARTS:
        of = f"ln of the {what}"
        # The value of ln A is what a span of data is needed for.
        of_data = ("N", "D") if p == "alpha" else ("N",)
        role = "exponent" if p == "alpha" else "level"
        parameters += [
            Parameter(
                b, role, -50.0, 50.0, "real", slots=of_data, meaning=f"b of {of} = a N^p + b; centred: its value"
            ),
            Parameter(a, "slope", -20.0, 20.0, "real", slots=("N",), meaning=f"a of {of}; centred: its slope in ln N"),
            Parameter(p, "exponent", -3.0, 3.0, "real", slots=("N",), meaning=f"power of N in {of}"),
        ]
    names = tuple(parameter.name for parameter in parameters)
    return Form(
        "farseer",
        (),
        "y = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) D^(-exp(a1 N^alpha + b1))",
        "arXiv 2506.10972",
        (SIZE, replace(DATA, transform="linear", valid="D >= 1")),
        tuple(parameters),
        Family("farseer", names, _value),
        starts=_starts,
        raw=_raw,
        limits="D -> infinity gives exp(a3 N^gamma + b3)",
        valid="N > 0, D >= 1, y > 0",
        note="nine parameters: judge it by rolling origin, never in sample; " + UNCHECKED,
        min_distinct=6,
    )
