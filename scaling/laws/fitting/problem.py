"""One table prepared for one form: what the solver minimises over, and the residuals at a point.

Legend: n rows, d axes, p parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from recscale.scaling.laws.forms.form import Form


class Prior(NamedTuple):
    """What is believed of one parameter: normal, or normal in its logarithm ("lognormal", mean then the median)."""

    kind: str
    mean: float
    sd: float


@dataclass(frozen=True)
class Problem:
    """One table prepared for one form. Arrays hold n real rows; padding happens at the call of the program.

    kind: "log" or "plain". target is ln y for "log", y for "plain"; delta[n] is Huber's width, unit[n] scales
    residuals. low, high: search-space bounds [p]. pull[3, p]: priors as penalties w (g(phi) - m)^2 / 2, rows w, m and 1
    where g is the exponential; w is 0 without a prior.
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
    pull: Float[np.ndarray, "3 p"]

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
    return Problem(form, axes, y, weights, widths, units, kind, low, high, np.zeros((3, len(low))))


def bounded(problem: Problem, bounds: Mapping[str, tuple[float, float]]) -> Problem:
    """The problem with search intervals of the caller, in natural values; coefficients count at the centre.

    Raises ValueError for an unknown parameter and for an interval without a value in it.
    """
    low, high = problem.low.copy(), problem.high.copy()
    for name, (least, most) in bounds.items():
        at = _place(problem.form, name, "bounds")
        ends = np.array([least, most], float)
        if problem.form.parameters[at].searched == "log":
            with np.errstate(divide="ignore", invalid="ignore"):
                ends = np.log(np.maximum(ends, 0.0))
        low[at], high[at] = max(low[at], ends[0]), min(high[at], ends[1])
        if not low[at] < high[at]:
            raise ValueError(f"bounds of {name}: no value lies between {least:g} and {most:g}")
    return replace(problem, low=low, high=high)


def with_priors(problem: Problem, priors: Mapping[str, Prior], variance: float) -> Problem:
    """The problem with priors, weighed against residuals of this variance. Raises ValueError for one that is none."""
    pull = problem.pull.copy()
    for name, prior in priors.items():
        at = _place(problem.form, name, "priors")
        logged = problem.form.parameters[at].searched == "log"
        kind, mean, sd = prior
        if kind not in ("normal", "lognormal") or not sd > 0 or (kind == "lognormal" and not (logged and mean > 0)):
            raise ValueError(f"prior of {name}: {tuple(prior)!r} is not (normal or lognormal, mean, positive sd)")
        natural = kind == "normal" and logged
        pull[:, at] = variance / sd**2, np.log(mean) if kind == "lognormal" else mean, float(natural)
    return replace(problem, pull=pull)


def _place(form: Form, name: str, what: str) -> int:
    if name not in form.names:
        raise ValueError(f"{what}: form {form.id} searches no {name!r}; it searches {', '.join(form.names)}")
    return form.names.index(name)


def residuals(problem: Problem, phi: Float[np.ndarray, " p"]) -> Float[np.ndarray, " n"]:
    """Residuals [n] on the fitted scale: ln yhat - ln y, or (yhat - y) / unit."""
    fitted = problem.form.value(phi, problem.axes)
    if problem.kind == "log":
        return np.log(fitted) - problem.target
    return (fitted - problem.y) / problem.unit


def residual_scale(residuals: Float[np.ndarray, " n"]) -> float:
    """Robust scale 1.4826 MAD of residuals[n]."""
    return float(1.4826 * np.median(np.abs(residuals - np.median(residuals))))
