"""Optimal allocation: the point of a cost level set where a fitted form is lowest.

For a cost k x1 x2 and the forms with two power terms the answer is closed: x1* = G (cost/k)^a with a = beta /
(alpha + beta) and G = (alpha A / beta B)^(1/(alpha+beta)) for the sum (kappa only changes G's power); tests
hold the numeric search to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq, minimize, minimize_scalar

from .law_fit import LawFit, Refused

_REACH = 60.0  # search interval in ln x around the fitted centre: 26 decades either side
_INTERVAL_DRAWS = 200


def product_cost(*axes: np.ndarray) -> np.ndarray:
    """x1 * x2 * ...: proportional to training FLOPs when every parameter is used once per example."""
    total = np.asarray(axes[0], float)
    for axis in axes[1:]:
        total = total * axis
    return total


def allocate(value: Callable, centre: np.ndarray, cost: Callable, budget: float) -> np.ndarray:
    """ln x[d] minimising value(ln x[d]) subject to cost(*x) = budget, cost increasing in every axis.

    Raises ValueError when no allocation reaches the budget, or when the best one runs to the edge of the
    search: then the form has no interior optimum under this cost.
    """
    dims = len(centre)

    def last(first: np.ndarray) -> float | None:
        def gap(log_last: float) -> float:
            return float(np.log(cost(*np.exp([*first, log_last]))) - np.log(budget))

        low, high = centre[-1] - _REACH, centre[-1] + _REACH
        if gap(low) > 0 or gap(high) < 0:
            return None
        return float(brentq(gap, low, high, xtol=1e-13))

    def loss(first: np.ndarray | float) -> float:
        at = last(np.atleast_1d(first))
        return np.inf if at is None else value(np.array([*np.atleast_1d(first), at]))

    if dims == 1:
        at = last(np.array([]))
        if at is None:
            raise ValueError(f"no value of the axis costs {budget:g}")
        return np.array([at])
    if dims == 2:
        grid = np.linspace(centre[0] - _REACH / 2, centre[0] + _REACH / 2, 121)
        values = np.array([loss(g) for g in grid])
        if not np.isfinite(values).any():
            raise ValueError(f"no allocation costs {budget:g}")
        k = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
        inside = 0 < k < len(grid) - 1 and np.isfinite(values[k - 1]) and np.isfinite(values[k + 1])
        if not inside or values[k - 1] == values[k] == values[k + 1]:
            raise ValueError(
                f"the optimum at cost {budget:g} lies on the edge of the search: the form has no interior optimum"
            )
        found = minimize_scalar(loss, bounds=(grid[k - 1], grid[k + 1]), method="bounded", options={"xatol": 1e-10})
        return np.array([found.x, last(np.array([found.x]))])
    found = minimize(loss, centre[:-1], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-14, "maxiter": 20000})
    if not np.isfinite(found.fun) or np.any(np.abs(found.x - centre[:-1]) > 0.9 * _REACH):
        raise ValueError(f"no interior optimum at cost {budget:g}")
    return np.array([*found.x, last(found.x)])


def optimum(
    law: LawFit, budget: float | Sequence[float], cost: Callable | None = None, *, interval: bool = False
) -> dict:
    """Cheapest way to a low metric: axis values minimising the fitted form on the level set cost(*axes) = budget.

    cost takes one array per slot and must grow in each; None is the plain product x1 * x2 * ... Returns axis ->
    value(s), "metric", "budget", and with `interval` (axis + "_interval"). Raises Refused when an exponent it rests on
    is refused.
    """
    _, solution = law.solved()
    missing = [p.name for p in law.form.parameters if p.role == "exponent" and law.params[p.name] is None]
    if missing:
        raise Refused(f"no optimum: {'; '.join(f'{name} refused ({law.reason(name)})' for name in missing)}")
    form, cost = law.form, cost or product_cost
    if any(slot.transform != "log" for slot in form.slots):
        raise ValueError(f"form {form.id} has an axis that is not a resource to buy; fix it and use the base form")
    centre = np.array([law.centre[slot] for slot in form.axes])
    budgets = np.atleast_1d(np.asarray(budget, float))

    def best(phi: np.ndarray) -> np.ndarray:
        def metric(log_axes: np.ndarray) -> float:
            return float(form.value(phi, (log_axes - centre)[None])[0])

        return np.stack([allocate(metric, centre, cost, float(b)) for b in budgets])

    chosen = best(solution.phi)
    values = np.array([form.value(solution.phi, (row - centre)[None])[0] for row in chosen])
    scalar = np.ndim(budget) == 0
    take = (lambda array: float(array[0])) if scalar else (lambda array: array)
    result = {slot: take(np.exp(chosen[:, j])) for j, slot in enumerate(form.axes)}
    result |= {"metric": take(values), "budget": take(budgets)}
    if interval:
        if law.draws is None:
            raise ValueError("no interval: the fit has no resampled draws")
        drawn = np.stack([best(phi) for phi in law.draws[:_INTERVAL_DRAWS]])
        ends = np.exp(np.percentile(drawn, [2.5, 97.5], axis=0))
        for j, slot in enumerate(form.axes):
            result[f"{slot}_interval"] = tuple(take(end[:, j]) for end in ends)
    return result
