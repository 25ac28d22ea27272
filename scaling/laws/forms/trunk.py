"""Runs that are not decayed yet: a warm-up-stable-decay schedule lies a constant above what its decay would give.

    y = E + A N^-alpha + B D^-beta + C (stage - 1)      stage 1: decayed, stage 2: still on the trunk

Checkpoints of a trunk say how the loss falls with data, the decayed runs how much a decay is worth; together they
forecast the decayed loss of a run from its unfinished curve (predict at stage 1). `stage` is read from the column
`decayed` where a table has no column of its own for it.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .form import DATA, SIZE, Axes, Family, Form, Linear, Parameter, Slot, coefficient, exponent, floor_parameter

_NAMES = ("E", "A", "alpha", "B", "beta", "C")


def _value(theta, axes, xp):
    floor, a, alpha, b, beta, gap = theta
    terms = xp.exp(a - xp.exp(alpha) * axes[:, 0]) + xp.exp(b - xp.exp(beta) * axes[:, 1])
    return xp.exp(floor) + terms + xp.exp(gap) * (axes[:, 2] - 1.0)


def _columns(e, axes):
    powers = [np.exp(-e[name] * axes[:, j]) for j, name in enumerate(("alpha", "beta"))]
    return [np.ones((1, len(axes))), *powers, (axes[:, 2] - 1.0)[None]]


@cache
def trunk(axes: Axes = None) -> Form:
    """y = E + A N^-alpha + B D^-beta + C (stage - 1): chinchilla with what a decay is worth as C."""
    gap = Parameter(
        "C",
        "shape",
        1e-9,
        10.0,
        "log",
        "target",
        ("stage",),
        unit="target",
        meaning="how far a decay brings the loss down",
    )
    return Form(
        "trunk",
        ("WSD",),
        "y = E + A N^-alpha + B D^-beta + C (stage - 1)",
        "chinchilla and a constant gain of the decay",
        (SIZE, DATA, Slot("stage", "stage", "1 decayed, 2 not", (), "linear", "1 or 2")),
        (floor_parameter(), coefficient("A", "N", "alpha"), exponent("alpha", "N"), coefficient("B", "D", "beta"),
         exponent("beta", "D"), gap),
        Family("trunk", _NAMES, _value),
        Linear(("alpha", "beta"), ("E", "A", "B", "C"), _columns, (False,) * 4),
        floor="E",
        limits="stage = 1 is chinchilla",
        valid="N > 0, D > 0, stage >= 1, y > E",
    )  # fmt: skip
