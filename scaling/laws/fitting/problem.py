"""One table prepared for one form: what the solver minimises over, and the residuals at a point.

Legend: n rows, d axes, p parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from recscale.scaling.laws.forms.form import Form


@dataclass(frozen=True)
class Problem:
    """One table prepared for one form. Arrays hold n real rows; padding happens at the call of the program.

    kind: "log" or "plain". target is ln y for "log", y for "plain"; delta[n] is Huber's width, unit[n] scales
    residuals. low, high: search-space bounds [p].
    """

    form: Form
    axes: Float[np.ndarray, "n d"]
    y: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    delta: Float[np.ndarray, " n"]
    unit: Float[np.ndarray, " n"]
    kind: Literal["log", "plain"]
    low: Float[np.ndarray, " p"]
    high: Float[np.ndarray, " p"]

    @property
    def target(self) -> np.ndarray:
        """What residuals are taken against."""
        return np.log(self.y) if self.kind == "log" else self.y


def make_problem(
    form: Form,
    axes: np.ndarray,
    y: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    delta: float | np.ndarray = 1e-3,
    unit: float | np.ndarray = 1.0,
    kind: Literal["log", "plain"] = "log",
) -> Problem:
    """Prepare centred axes[n, d] and metric y[n]. kind "log" needs y > 0; "plain" takes any finite metric."""
    axes, y = np.asarray(axes, float), np.asarray(y, float)
    n = len(y)
    if kind == "log" and not np.all(y > 0):
        raise ValueError(f"form {form.id}: log residuals need a positive metric, found a minimum of {y.min():g}")
    weights = np.ones(n) if weights is None else np.asarray(weights, float)
    scale = float(np.median(np.abs(y))) or 1.0
    low, high = form.bounds(axes, scale)
    widths, units = (np.broadcast_to(np.asarray(value, float), (n,)) for value in (delta, unit))
    return Problem(form, axes, y, weights, widths, units, kind, low, high)


def residuals(problem: Problem, phi: Float[np.ndarray, " p"]) -> Float[np.ndarray, " n"]:
    """Residuals [n] on the fitted scale: ln yhat - ln y, or (yhat - y) / unit."""
    fitted = problem.form.value(phi, problem.axes)
    if problem.kind == "log":
        return np.log(fitted) - problem.target
    return (fitted - problem.y) / problem.unit


def residual_scale(residuals: Float[np.ndarray, " n"]) -> float:
    """Robust scale 1.4826 MAD of residuals[n]."""
    return float(1.4826 * np.median(np.abs(residuals - np.median(residuals))))
