"""Several architectures in one hierarchical fit: one floor where they read the same stream, exponents partially pooled.

Stage one fits y = E + A_k x^-alpha_k to all architectures at once (E_k each where their streams differ). Stage two
takes the log exponents as drawn from one normal distribution around a common mean, whose variance tau^2 is estimated
from how much more they differ than their errors explain (DerSimonian and Laird), and shrinks each towards that mean by
as much as its own error deserves. With tau = 0 all share one exponent; with tau large each keeps its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import special

from recscale.scaling.laws.fitting.fit import fit
from recscale.scaling.laws.fitting.law_fit import LawFit, Refused, Settings
from recscale.scaling.laws.forms.form import Family, Form, Linear, Slot, coefficient, exponent, floor_parameter
from recscale.scaling.laws.tables.validate import require

_STREAM = ("dataset", "preset", "data_seed", "examples", "epochs")
_NUMBER = "architecture_number"


@dataclass(frozen=True)
class Pooled:
    """One architecture: its exponent by itself and pooled, each with its 95 % interval; None where refused."""

    name: str
    alone: float | None
    alone_interval: tuple[float, float] | None
    pooled: float | None
    pooled_interval: tuple[float, float] | None
    share: float | None


@dataclass(frozen=True)
class Hierarchy:
    """The pooled exponents, their common mean and spread tau (of ln alpha), and the joint fit they come from.

    floors: name -> floor ("all" where it is shared), None where refused. shared: why the floor is shared or is not.
    """

    exponents: list[Pooled]
    mean: float | None
    mean_interval: tuple[float, float] | None
    tau: float | None
    floors: dict[str, float | None]
    shared: str
    law: LawFit = field(repr=False)


def pooled_form(names: tuple[str, ...], shared: bool) -> Form:
    """y = E + A_k x^-alpha_k for architecture k, E_k each unless shared; its second axis is k = 1, 2, ..."""
    floors = ("E",) if shared else tuple(f"E_{name}" for name in names)
    pairs = [(f"A_{name}", f"alpha_{name}") for name in names]
    own = [*floors, *(part for pair in pairs for part in pair)]
    first = len(floors)

    def value(theta, axes, xp):
        y = 0.0
        for k in range(len(names)):
            floor = xp.exp(theta[0 if shared else k])
            curve = floor + xp.exp(theta[first + 2 * k] - xp.exp(theta[first + 1 + 2 * k]) * axes[:, 0])
            y = y + xp.where(xp.abs(axes[:, 1] - (k + 1)) < 0.5, curve, 0.0)
        return y

    def columns(exponents, axes):
        own_rows = [(np.abs(axes[:, 1] - (k + 1)) < 0.5).astype(float) for k in range(len(names))]
        constant = [np.ones((1, len(axes)))] if shared else [rows[None] for rows in own_rows]
        terms = [
            rows * np.exp(-exponents[alpha] * axes[:, 0]) for rows, (_, alpha) in zip(own_rows, pairs, strict=True)
        ]
        return constant + terms

    parameters = [floor_parameter(name) for name in floors]
    for name, alpha in pairs:
        parameters += [coefficient(name, "x", alpha), exponent(alpha, "x")]
    coefficients = (*floors, *(name for name, _ in pairs))
    linear = Linear(tuple(a for _, a in pairs), coefficients, columns, (False,) * len(coefficients))
    return Form(
        "pooled",
        (),
        "y = E + A_k x^-alpha_k of architecture k",
        "power laws side by side",
        (Slot("x", "dense_params", "parameters"), Slot("k", _NUMBER, "", (), "linear")),
        tuple(parameters),
        Family(f"pooled_{len(names)}_{'one' if shared else 'own'}", tuple(own), value),
        linear,
        floor="E" if shared else None,
        limits="x -> infinity gives the floor",
        valid="x > 0, y > E",
    )


def hierarchy(
    table: pd.DataFrame,
    axis: str = "dense_params",
    target: str = "logloss",
    *,
    by: str = "architecture",
    cluster: str | None = None,
    where: str | None = None,
    bootstrap: int = Settings.bootstrap,
    seed: int = 0,
) -> Hierarchy:
    """Exponents of every architecture along an axis, by themselves and pooled.

    Raises Refused where the joint fit or the resampling it needs is refused, ValueError for fewer than three
    architectures: the spread of two exponents is not known.
    """
    require(table, by, "the architectures")
    names = tuple(sorted(map(str, table[by].dropna().unique())))
    if len(names) < 3:
        raise ValueError(f"{by} has {len(names)} values; pooling needs three (recscale compare takes two)")
    shared, why = _same_stream(table, by)
    numbered = table.assign(**{_NUMBER: table[by].astype(str).map({name: k + 1.0 for k, name in enumerate(names)})})
    law = fit(
        numbered, pooled_form(names, shared), {"x": axis, "k": _NUMBER}, target, bootstrap, cluster, where=where,
        seed=seed, profile=False,
    )  # fmt: skip
    _, solution = law.solved()
    if law.draws is None:
        raise Refused(f"no pooling without resampled fits: {law.reason('intervals') or 'bootstrap is 0'}")
    places = [law.form.names.index(f"alpha_{name}") for name in names]
    logs = solution.phi[places]
    errors = law.draws[:, places].std(axis=0)
    granted = [law.params[f"alpha_{name}"] is not None for name in names]
    floors = {"all" if shared else p.name[2:]: law.params[p.name] for p in law.form.parameters if p.role == "floor"}
    if sum(granted) < 3:
        alone = {name: (law.params[f"alpha_{name}"], law.intervals.get(f"alpha_{name}")) for name in names}
        exponents = [Pooled(name, *found, None, None, None) for name, found in alone.items()]
        return Hierarchy(exponents, None, None, None, floors, why, law)
    return _pooled(law, names, logs, errors, np.array(granted), floors, why)


def _pooled(law: LawFit, names, logs, errors, granted, floors, why: str) -> Hierarchy:
    """Stage two on the exponents that are granted."""
    y, v = logs[granted], errors[granted] ** 2
    w = 1 / v
    fixed = np.sum(w * y) / w.sum()
    spare = len(y) - 1
    excess = np.sum(w * (y - fixed) ** 2) - spare
    tau2 = max(excess / (w.sum() - np.sum(w**2) / w.sum()), 0.0)
    w = 1 / (v + tau2)
    mean, se = np.sum(w * y) / w.sum(), 1 / np.sqrt(w.sum())
    t = special.stdtrit(spare, 0.975)
    exponents = []
    for k, name in enumerate(names):
        alone, interval = law.params[f"alpha_{name}"], law.intervals.get(f"alpha_{name}")
        if not granted[k]:
            exponents.append(Pooled(name, None, None, None, None, None))
            continue
        share = tau2 / (tau2 + errors[k] ** 2)
        centre = share * logs[k] + (1 - share) * mean
        # The error of the common mean is part of what is shrunk towards it.
        sd = np.sqrt(share * errors[k] ** 2 + (1 - share) ** 2 * se**2)
        ends = tuple(float(np.exp(centre + side * t * sd)) for side in (-1, 1))
        exponents.append(Pooled(name, alone, interval, float(np.exp(centre)), (ends[0], ends[1]), float(share)))
    around = (float(np.exp(mean - t * se)), float(np.exp(mean + t * se)))
    return Hierarchy(exponents, float(np.exp(mean)), around, float(np.sqrt(tau2)), floors, why, law)


def _same_stream(table: pd.DataFrame, by: str) -> tuple[bool, str]:
    """Whether every architecture read the same data, and what tells."""
    known = [column for column in _STREAM if column in table and table[column].notna().any()]
    for column in known:
        values = table.groupby(by)[column].agg(lambda v: tuple(sorted(set(map(str, v.dropna())))))
        if values.nunique() > 1:
            return False, f"each has its own floor: {column} differs between them"
    if "dataset" not in known:
        return False, "each has its own floor: the table does not say that they read the same data set"
    return True, f"one floor for all: the same {', '.join(known)}"
