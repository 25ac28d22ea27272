"""The joint form's two streams, logloss and t of AUC: one set of parameters, each stream with its own
residual scale.

Residuals are (yhat - y) / unit with one unit per stream. The units are profiled: fit, measure each stream's
robust residual scale, set the units so both streams are equally noisy, refit until the ratio settles. An AUC
with large noise then carries little weight instead of drowning logloss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from recscale.scaling.laws.fitting.problem import Problem, make_problem, residual_scale, residuals
from recscale.scaling.laws.fitting.solver import Solution, refine, solve
from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.tables.validate import Rows

_ROUNDS = 12
# Residual scales below this share of the metric are rounding and say nothing about the noise.
_SCALE_FLOOR = 1e-9
V_RATIO = (0.8, 1.6)


def stream_problem(form: Form, columns: Sequence[np.ndarray], rows: Rows, delta: float) -> Problem:
    """Rows twice, logloss then t, with a last axis 0 or 1; units are each stream's median, so residuals are
    relative.
    """
    assert rows.second is not None, "the joint form needs the AUC column"
    n = len(rows.y)
    marker = np.repeat([0.0, 1.0], n)
    axes = np.column_stack([*(np.tile(column, 2) for column in columns), marker])
    y = np.concatenate([rows.y, rows.second])
    unit = np.repeat([np.median(np.abs(rows.y)), np.median(np.abs(rows.second))], n)
    return make_problem(form, axes, y, weights=np.tile(rows.weights, 2), delta=delta, unit=unit, kind="plain")


def solve_streams(problem: Problem) -> tuple[Problem, Solution]:
    """Best fit with profiled stream units: (problem with its final units, solution)."""
    second = problem.axes[:, -1] > 0.5
    base = problem.unit.copy()
    solution = solve(problem)
    for _ in range(_ROUNDS):
        r = residuals(problem, solution.phi) * problem.unit
        noise = [max(residual_scale(r[part]), _SCALE_FLOOR * base[part][0]) for part in (~second, second)]
        # The first stream keeps its unit, so Huber's width keeps its meaning there.
        unit = np.where(second, base[~second][0] * noise[1] / noise[0], base)
        settled = np.allclose(unit, problem.unit, rtol=1e-3)
        problem = replace(problem, unit=unit)
        batch = refine(problem, solution.phi[None])
        solution = replace(solution, phi=batch.phi[0], objective=float(batch.objective[0]))
        if settled:
            break
    return problem, solve(problem)


def v_warning(fitted: float, measured: float | None) -> tuple[str, ...]:
    """Warning when fitted v over measured E[p (1 - p)] leaves [.8, 1.6]; a ratio a little above 1 is
    expected.
    """
    if measured is None:
        return ()
    ratio = fitted / measured
    if V_RATIO[0] <= ratio <= V_RATIO[1]:
        return ()
    return (f"fitted v {fitted:.4g} is {ratio:.2f} times the measured E[p(1-p)] {measured:.4g}, outside {V_RATIO}",)
