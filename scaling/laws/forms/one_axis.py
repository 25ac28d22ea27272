"""One-axis forms that are not plain power laws: log-linear, gains, saturating and broken (u = centred ln x):

log_linear    y = a - b u
gain          y = c e^(gamma u)
saturating    (y - E) / (E0 - y)^a = A e^(-c u)                                     (arXiv 2209.06640, M4)
broken        y = a + b e^(-c0 u) prod_i (1 + e^((u - ln d_i) / f_i))^(-c_i f_i)    (arXiv 2210.14891)
"""

from __future__ import annotations

from functools import cache

import jax
import numpy as np

from .form import ONE, UNCHECKED, Axes, Family, Form, Linear, Parameter, coefficient, exponent, floor_parameter, sobol

_MANY_STARTS = 64
_NEWTON_STEPS = 25


def _between(unit: np.ndarray, low: float, high: float, log: bool = True) -> np.ndarray:
    """Unit-interval samples onto [low, high], evenly in the logarithm or plainly."""
    return low * (high / low) ** unit if log else low + unit * (high - low)


@cache
def log_linear(axes: Axes = None, real: bool = False) -> Form:
    """y = a - b ln x: the limit of power_offset as alpha -> 0 with A -> infinity; fitted as a rival to every
    one-axis form.
    """

    def value(theta, axes, xp):
        return theta[0] - theta[1] * axes[:, 0]

    def raw(centred, log_centre):
        return {"a": centred["a"] + centred["b"] * log_centre["x"], "b": centred["b"]}

    signed = ("real", "target")
    parameters = (
        Parameter("a", "level", -1e6, 1e6, *signed, unit="target", meaning="metric at ln x = 0; centred: at x0"),
        Parameter("b", "slope", -1e6, 1e6, *signed, unit="target per e-fold", meaning="fall of y per e-fold"),
    )
    linear = Linear((), ("a", "b"), lambda exponents, axes: [np.ones(len(axes)), -axes[:, 0]], (True, True))
    return Form(
        "log_linear",
        ("LL",),
        "y = a - b ln x",
        "limit of a power law",
        (ONE,),
        parameters,
        Family("log_linear", ("a", "b"), value),
        linear,
        raw=raw,
        limits="unbounded as x -> infinity: never a forecast of a floor",
        valid="x > 0",
        target="any" if real else "positive",
        min_distinct=3,
        signed=None if real else lambda: log_linear(real=True),
    )


@cache
def gain(axes: Axes = None) -> Form:
    """Delta = c x^gamma, to store published gains. gamma is not an exponent of the loss and is compared with
    nothing.
    """

    def value(theta, axes, xp):
        return xp.exp(theta[0] + xp.exp(theta[1]) * axes[:, 0])

    parameters = (coefficient("c", "x", "gamma", sign=-1.0), exponent("gamma", "x"))
    linear = Linear(("gamma",), ("c",), lambda e, axes: [np.exp(e["gamma"] * axes[:, 0])], (False,))
    return Form(
        "gain",
        ("GAIN",),
        "delta = c x^gamma",
        "published gains over a baseline",
        (ONE,),
        parameters,
        Family("gain", ("c", "gamma"), value),
        linear,
        limits="unbounded as x -> infinity",
        valid="x > 0, delta > 0",
        note="gamma depends on the baseline and the range: it falls as the loss exponent rises",
    )


def _solve_saturating(log_a, rhs, xp):
    """q with ln sigma(q) - a ln sigma(-q) = rhs, elementwise.

    The left side is increasing and convex or concave throughout, so Newton from its asymptote converges; one
    more step outside the loop carries the derivative.
    """
    a = xp.exp(log_a)

    def gap(q):
        return -xp.logaddexp(0.0, -q) + a * xp.logaddexp(0.0, q) - rhs

    def slope(q):
        s = 0.5 * (1.0 + xp.tanh(0.5 * q))
        return (1.0 - s) + a * s

    def newton(q):
        return q - gap(q) / slope(q)

    q = xp.where(rhs > 0, rhs / a, rhs)
    if xp is np:
        for _ in range(_NEWTON_STEPS):
            q = newton(q)
        return q
    q = jax.lax.fori_loop(0, _NEWTON_STEPS, lambda _, q: newton(q), jax.lax.stop_gradient(q))
    return newton(jax.lax.stop_gradient(q))


@cache
def saturating(axes: Axes = None) -> Form:
    """(y - E) / (E0 - y)^a = A x^-c: saturates at E0 for small x and at E for large x."""

    def value(theta, axes, xp):
        floor, span = xp.exp(theta[0]), xp.exp(theta[1]) - xp.exp(theta[0])
        a = xp.exp(theta[2])
        rhs = theta[3] - xp.exp(theta[4]) * axes[:, 0] - (1.0 - a) * xp.log(span)
        q = _solve_saturating(theta[2], rhs, xp)
        return floor + span * 0.5 * (1.0 + xp.tanh(0.5 * q))

    def starts(axes, y, generator):
        unit = sobol(2, 6)
        low, high = float(y.min()), float(y.max())
        reach = high - low
        floor = low * (1.0 - _between(unit[:, 0], 1e-3, 0.95))
        ceiling = high + reach * _between(unit[:, 1], 1e-2, 10.0)
        named = {"E": floor, "E0": ceiling, "a": [], "A": [], "c": []}
        for e, top in zip(floor, ceiling, strict=True):
            # Given E and E0 the form is linear in (a, ln A, c): ln(y - E) = a ln(E0 - y) + ln A - c u.
            design = np.stack([np.log(top - y), np.ones(len(y)), -axes[:, 0]], axis=1)
            a, log_a, c = np.linalg.lstsq(design, np.log(y - e), rcond=None)[0]
            named["a"].append(np.clip(a, 0.05, 20.0))
            named["A"].append(np.exp(np.clip(log_a, -25, 25)))
            named["c"].append(np.clip(c, 0.03, 10.0))
        return {name: np.asarray(values) for name, values in named.items()}

    parameters = (
        floor_parameter(),
        Parameter("E0", "ceiling", 1e-9, 1e4, "log", "target", ("x",), unit="target", meaning="metric at x -> 0"),
        Parameter("a", "shape", 1e-3, 1e3, "log", "one", ("x",), meaning="how the ceiling is left"),
        Parameter(
            "A",
            "coefficient",
            1e-15,
            1e15,
            "log",
            "one",
            ("x",),
            (("x", "c", 1.0),),
            "target^(1-a) * x^c",
            "scale",
        ),
        exponent("c", "x"),
    )
    return Form(
        "m4",
        ("M4",),
        "(y - E) / (E0 - y)^a = A x^-c",
        "arXiv 2209.06640",
        (ONE,),
        parameters,
        Family("saturating", ("E", "E0", "a", "A", "c"), value),
        starts=starts,
        floor="E",
        limits="x -> 0 gives E0, x -> infinity gives E; a -> 0 is power_offset",
        valid="x > 0, E < y < E0",
        note=UNCHECKED,
        min_distinct=8,
    )


@cache
def broken(axes: Axes = None, breaks: int = 1) -> Form:
    """y = a + b x^-c0 prod_i (1 + (x/d_i)^(1/f_i))^(-c_i f_i): power laws joined by smooth breaks."""
    if breaks not in (1, 2):
        raise ValueError(f"bnsl: breaks must be 1 or 2 (0 is power_offset), found {breaks}")
    names = ["a", "b", "c0"] + [f"{kind}{i}" for i in range(1, breaks + 1) for kind in ("c", "d", "f")]

    def log_shape(c0, turns, u, xp):
        total = -c0 * u
        for c, log_d, f in turns:
            total = total - c * f * xp.logaddexp(0.0, (u - log_d) / f)
        return total

    def value(theta, axes, xp):
        turns = [(theta[3 + 3 * i], theta[4 + 3 * i], xp.exp(theta[5 + 3 * i])) for i in range(breaks)]
        return xp.exp(theta[0]) + xp.exp(theta[1] + log_shape(theta[2], turns, axes[:, 0], xp))

    def columns(e, axes):
        turns = [(e[f"c{i}"], np.log(e[f"d{i}"]), e[f"f{i}"]) for i in range(1, breaks + 1)]
        shape = log_shape(e["c0"], turns, axes[:, 0], np)
        return [np.ones((1, len(axes))), np.exp(np.clip(shape, -300, 300))]

    def sampler(axes):
        unit = sobol(1 + 3 * breaks, 11)
        low, high = axes[:, 0].min(), axes[:, 0].max()
        found = {"c0": _between(unit[:, 0], -0.2, 1.5, log=False)}
        for i in range(1, breaks + 1):
            turn, place, width = unit[:, 3 * i - 2], unit[:, 3 * i - 1], unit[:, 3 * i]
            found[f"c{i}"] = _between(turn, -1.5, 1.5, log=False)
            found[f"d{i}"] = np.exp(low + (0.1 + 0.8 * place) * (high - low))
            found[f"f{i}"] = _between(width, 0.05, 3.0)
        return found

    parameters = [
        floor_parameter("a"),
        coefficient("b", "x", "c0", meaning="scale"),
        Parameter("c0", "exponent", -5.0, 20.0, "real", "one", ("x",), meaning="slope before the first break"),
    ]
    for i in range(1, breaks + 1):
        parameters += [
            Parameter(
                f"c{i}",
                "exponent",
                -20.0,
                20.0,
                "real",
                "one",
                ("x",),
                meaning=f"change of slope at break {i}",
            ),
            Parameter(
                f"d{i}",
                "location",
                0.1,
                10.0,
                "log",
                "axis:x",
                ("x",),
                unit="x",
                meaning=f"place of break {i}",
            ),
            Parameter(f"f{i}", "shape", 1e-2, 1e2, "log", "one", ("x",), meaning=f"width of break {i}"),
        ]
    linear = Linear(tuple(names[2:]), ("a", "b"), columns, (False, False), sampler=sampler)
    return Form(
        "bnsl",
        ("BNSL",),
        "y = a + b x^-c0 prod_i (1 + (x/d_i)^(1/f_i))^(-c_i f_i)",
        "arXiv 2210.14891, eq. 1",
        (ONE,),
        tuple(parameters),
        Family(f"broken_{breaks}", tuple(names), value),
        linear,
        floor="a",
        limits="x -> infinity gives a if the last slope is positive",
        valid="x > 0, y > a",
        min_distinct=12 * breaks,
        start_count=_MANY_STARTS,
    )
