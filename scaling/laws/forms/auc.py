"""Forms of AUC through t = 2 Phi^-1(AUC)^2, alone and together with logloss:

auc      t = S - A x^-alpha
joint    logloss = E + (v/2) sum_j A_j x_j^-alpha_j  and  t = S - sum_j A_j x_j^-alpha_j
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .form import DATA, ONE, SIZE, Axes, Family, Form, Linear, Parameter, Slot, coefficient, exponent, floor_parameter


def _ceiling() -> Parameter:
    return Parameter("S", "ceiling", 1e-6, 1e4, "log", "target", (), unit="t", meaning="t with the axis unlimited")


@cache
def auc(axes: Axes = None) -> Form:
    """t = S - A x^-alpha with t = 2 Phi^-1(AUC)^2: parameters live on t, predictions come back as AUC."""

    def value(theta, axes, xp):
        return xp.exp(theta[0]) - xp.exp(theta[1] - xp.exp(theta[2]) * axes[:, 0])

    linear = Linear(
        ("alpha",),
        ("S", "A"),
        lambda e, axes: [np.ones((1, len(axes))), -np.exp(-e["alpha"] * axes[:, 0])],
        (False, False),
    )
    return Form(
        "auc",
        ("AUC",),
        "t = S - A x^-alpha, t = 2 Phi^-1(AUC)^2",
        "Gaussian logits",
        (ONE,),
        (_ceiling(), coefficient("A", "x", "alpha"), exponent("alpha", "x")),
        Family("auc", ("S", "A", "alpha"), value),
        linear,
        limits="x -> infinity gives S",
        valid="x > 0, .5 <= AUC < 1",
        target="auc",
    )


@cache
def joint(axes: Axes = None) -> Form:
    """logloss = E + (v/2) sum_j A_j x_j^-alpha_j and t = S - sum_j A_j x_j^-alpha_j: one bracket, two
    streams.

    Rows carry a last axis that is 0 for logloss and 1 for t.
    """
    slots = axes if axes is not None and len(axes) > 1 else ("x",)
    pairs = [("A", "alpha")] if len(slots) == 1 else [(f"A_{s}", f"alpha_{s}") for s in slots]

    def value(theta, axes, xp):
        bracket = 0.0
        for j in range(len(pairs)):
            bracket = bracket + xp.exp(theta[3 + 2 * j] - xp.exp(theta[4 + 2 * j]) * axes[:, j])
        loss = xp.exp(theta[0]) + 0.5 * xp.exp(theta[1]) * bracket
        return xp.where(axes[:, len(pairs)] > 0.5, xp.exp(theta[2]) - bracket, loss)

    names = ["E", "v", "S"] + [name for pair in pairs for name in pair]

    def columns(e, axes):
        second = (axes[:, len(pairs)] > 0.5).astype(float)
        terms = [np.exp(-e[alpha] * axes[:, j]) for j, (_, alpha) in enumerate(pairs)]
        shared = [-second * term + 0.5 * e["v"] * (1 - second) * term for term in terms]
        return [(1 - second)[None], second[None], *shared]

    parameters = [
        floor_parameter(),
        Parameter(
            "v",
            "shape",
            1e-4,
            1e2,
            "log",
            "one",
            (),
            unit="1",
            meaning="E[p (1 - p)]: logloss per unit of missed variance",
        ),
        _ceiling(),
    ]
    for slot, (name, alpha) in zip(slots, pairs, strict=True):
        parameters += [coefficient(name, slot, alpha), exponent(alpha, slot)]
    linear = Linear(
        tuple(["v"] + [alpha for _, alpha in pairs]),
        ("E", "S", *(name for name, _ in pairs)),
        columns,
        (False,) * (2 + len(pairs)),
        grid={"v": (0.03, 0.08, 0.15, 0.3, 1.0)},
    )
    described = {"x": ONE, "N": SIZE, "D": DATA}
    return Form(
        "joint",
        ("JOINT",),
        "logloss = E + (v/2) sum_j A_j x_j^-alpha_j; t = S - sum_j A_j x_j^-alpha_j",
        "Gaussian logits",
        tuple(described.get(s, Slot(s, s)) for s in slots),
        tuple(parameters),
        Family(f"joint_{len(slots)}", tuple(names), value),
        linear,
        floor="E",
        limits="every axis -> infinity gives (E, S)",
        valid="x_j > 0, .5 <= AUC < 1, logloss > E",
        target="any",
        streams=True,
        note="v is free; a little above the measured E[p (1 - p)] is expected",
    )
