"""Mixture-of-experts forms (u = centred ln x):

moe_granularity  y = c + (g G^-gamma + a) N^-alpha + b D^-beta                          (arXiv 2402.07871)
moe_unified      ln y = a ln N + b ln Ehat + c ln N ln Ehat + d                         (arXiv 2202.01169)
moe_sparsity     y = e + a N^-alpha + b D^-beta + c s^-lambda + d s^-delta N^-gamma     (arXiv 2501.12370)
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .form import (
    DATA,
    SIZE,
    UNCHECKED,
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


@cache
def moe_granularity(axes: Axes = None) -> Form:
    """y = c + (g G^-gamma + a) N^-alpha + b D^-beta, G the expert granularity."""

    def value(theta, axes, xp):
        c, g, gamma, a, alpha, b, beta = theta
        size = xp.exp(alpha) * axes[:, 0]
        fine = xp.exp(g - xp.exp(gamma) * axes[:, 2] - size)
        return xp.exp(c) + fine + xp.exp(a - size) + xp.exp(b - xp.exp(beta) * axes[:, 1])

    def columns(e, axes):
        size = np.exp(-e["alpha"] * axes[:, 0])
        return [
            np.ones((1, len(axes))),
            size * np.exp(-e["gamma"] * axes[:, 2]),
            size,
            np.exp(-e["beta"] * axes[:, 1]),
        ]

    fine = coefficient("g", "N", "alpha", ("G", "gamma"), meaning="contribution of coarse experts")
    names = ("c", "g", "gamma", "a", "alpha", "b", "beta")
    parameters = (
        floor_parameter("c"),
        fine,
        exponent("gamma", "G"),
        coefficient("a", "N", "alpha"),
        exponent("alpha", "N"),
        coefficient("b", "D", "beta"),
        exponent("beta", "D"),
    )
    return Form(
        "moe_granularity",
        ("MOE-G",),
        "y = c + (g G^-gamma + a) N^-alpha + b D^-beta",
        "arXiv 2402.07871",
        (SIZE, DATA, Slot("G", "expert_granularity")),
        parameters,
        Family("moe_granularity", names, value),
        Linear(("gamma", "alpha", "beta"), ("c", "g", "a", "b"), columns, (False,) * 4),
        floor="c",
        limits="N, D -> infinity gives c",
        valid="N > 0, D > 0, G >= 1, y > c",
        note=UNCHECKED,
    )


@cache
def moe_unified(axes: Axes = None) -> Form:
    """ln y = a ln N + b ln Ehat + c ln N ln Ehat + d; Ehat is the saturated expert count, a column."""

    def value(theta, axes, xp):
        a, b, c, d = theta
        return xp.exp(a * axes[:, 0] + b * axes[:, 1] + c * axes[:, 0] * axes[:, 1] + d)

    def raw(centred, log_centre):
        a, b, c, d = (centred[name] for name in "abcd")
        n0, e0 = log_centre["N"], log_centre["Ehat"]
        return {"a": a - c * e0, "b": b - c * n0, "c": c, "d": d - a * n0 - b * e0 + c * n0 * e0}

    parameters = tuple(
        Parameter(name, role, -1e3, 1e3, "real", "one", slots, unit=unit, meaning=meaning)
        for name, role, slots, unit, meaning in (
            ("a", "slope", ("N",), "1", "log-log slope in N at Ehat = 1; centred: at the mean ln Ehat"),
            ("b", "slope", ("Ehat",), "1", "log-log slope in Ehat at N = 1; centred: at the mean ln N"),
            ("c", "slope", ("N", "Ehat"), "1", "interaction"),
            ("d", "level", (), "ln target", "ln y at N = Ehat = 1; centred: at the centre"),
        )
    )
    linear = Linear(
        (),
        ("a", "b", "c", "d"),
        lambda e, axes: [axes[:, 0], axes[:, 1], axes[:, 0] * axes[:, 1], np.ones(len(axes))],
        (True,) * 4,
        of="log",
    )
    return Form(
        "moe_unified",
        ("MOE-U",),
        "ln y = a ln N + b ln Ehat + c ln N ln Ehat + d",
        "arXiv 2202.01169",
        (SIZE, Slot("Ehat", "saturated_experts")),
        parameters,
        Family("moe_unified", tuple("abcd"), value),
        linear,
        raw=raw,
        limits="no floor: not a forecast far beyond the rows",
        valid="N > 0, Ehat > 0, y > 0",
        note=UNCHECKED,
        target="log_target",
        min_distinct=3,
    )


@cache
def moe_sparsity(axes: Axes = None) -> Form:
    """y = e + a N^-alpha + b D^-beta + c s^-lambda + d s^-delta N^-gamma, s the active fraction."""

    def value(theta, axes, xp):
        e, a, alpha, b, beta, c, lam, d, delta, gamma = theta
        n, data, s = axes[:, 0], axes[:, 1], axes[:, 2]
        alone = xp.exp(a - xp.exp(alpha) * n) + xp.exp(b - xp.exp(beta) * data) + xp.exp(c - xp.exp(lam) * s)
        return xp.exp(e) + alone + xp.exp(d - xp.exp(delta) * s - xp.exp(gamma) * n)

    def columns(e, axes):
        n, data, s = axes[:, 0], axes[:, 1], axes[:, 2]
        alone = [np.exp(-e["alpha"] * n), np.exp(-e["beta"] * data), np.exp(-e["lambda"] * s)]
        return [np.ones((1, len(axes))), *alone, np.exp(-e["delta"] * s - e["gamma"] * n)]

    both = coefficient("d", "s", "delta", ("N", "gamma"), meaning="joint contribution of size and sparsity")
    names = ("e", "a", "alpha", "b", "beta", "c", "lambda", "d", "delta", "gamma")
    parameters = (
        floor_parameter("e"),
        coefficient("a", "N", "alpha"),
        exponent("alpha", "N"),
        coefficient("b", "D", "beta"),
        exponent("beta", "D"),
        coefficient("c", "s", "lambda"),
        exponent("lambda", "s"),
        both,
        exponent("delta", "s"),
        exponent("gamma", "N"),
    )
    linear = Linear(("alpha", "beta", "lambda", "delta", "gamma"), ("e", "a", "b", "c", "d"), columns, (False,) * 5)
    return Form(
        "moe_sparsity",
        ("MOE-S",),
        "y = e + a N^-alpha + b D^-beta + c s^-lambda + d s^-delta N^-gamma",
        "arXiv 2501.12370",
        (SIZE, DATA, Slot("s", "active_fraction", "fraction", valid="0 < s <= 1")),
        parameters,
        Family("moe_sparsity", names, value),
        linear,
        floor="e",
        limits="every axis -> infinity gives e",
        valid="N > 0, D > 0, 0 < s <= 1, y > e",
        note=UNCHECKED,
    )
