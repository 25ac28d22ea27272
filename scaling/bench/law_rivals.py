"""What most papers do with a table of runs, to set beside the fitter: SciPy's L-BFGS from a grid of starts on the Huber
loss of ln y, and percentiles over rows drawn again. It refuses nothing.

Two packages that fit laws could stand here too: `simple-scaling-laws` asks for Python 3.12, `vpnls` has no release that
pip finds.

Legend: n rows, k terms; theta = (ln E where there is a floor, ln A_1 ... ln A_k, alpha_1 ... alpha_k).
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import optimize

from recscale.scaling.laws.forms import registry

NAME = "SciPy L-BFGS, plain bootstrap"
FORMS = ("power", "power_offset", "chinchilla")
DELTA, DRAWS, LEVEL = 1e-3, 100, 0.95
_FLOORS, _EXPONENTS = (0.5, 0.9), (0.1, 0.3, 0.8)


def plain_bootstrap(
    frame: pd.DataFrame, form: str, target: str = "logloss", seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Parameter -> (value, low, high) of a law of `FORMS` along dense_params (and examples)."""
    resolved = registry.get(form)
    columns = ["dense_params", "examples"][: len(resolved.slots)]
    u = np.log(frame[columns].to_numpy(float))
    u, y = u - u.mean(axis=0), frame[target].to_numpy(float)
    floor = resolved.floor is not None
    best = min((_minimise(start, u, y, floor) for start in _starts(u, y, floor)), key=lambda found: found.fun)
    draw = np.random.default_rng(seed)
    rows = draw.integers(len(y), size=(DRAWS, len(y)))
    again = np.array([_minimise(best.x, u[chosen], y[chosen], floor).x for chosen in rows])
    low, high = np.percentile(again, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    k = u.shape[1]
    told = {name: (float(best.x[at]), float(low[at]), float(high[at]))
            for name, at in zip(("alpha", "beta"), range(floor + k, floor + 2 * k), strict=False)}  # fmt: skip
    if floor:
        told["E"] = (float(np.exp(best.x[0])), float(np.exp(low[0])), float(np.exp(high[0])))
    return told


def _starts(u: np.ndarray, y: np.ndarray, floor: bool) -> list[np.ndarray]:
    k, found = u.shape[1], []
    for share, alpha in product(_FLOORS if floor else (0.0,), _EXPONENTS):
        above = max(float(np.median(y)) - share * y.min(), 1e-6) / k
        head = [np.log(share * y.min())] if floor else []
        found.append(np.array([*head, *[np.log(above)] * k, *[alpha] * k]))
    return found


def _minimise(start: np.ndarray, u: np.ndarray, y: np.ndarray, floor: bool) -> optimize.OptimizeResult:
    # With SciPy's own tolerances it stops early at objectives this small, and its intervals are narrower still.
    tight: Any = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 500}
    return optimize.minimize(_objective, start, args=(u, np.log(y), floor), jac=True, method="L-BFGS-B", options=tight)


def _objective(
    theta: Float[np.ndarray, " p"], u: Float[np.ndarray, "n k"], target: Float[np.ndarray, " n"], floor: bool
) -> tuple[float, Float[np.ndarray, " p"]]:
    """The summed Huber loss and its gradient."""
    k = u.shape[1]
    alphas = theta[floor + k :]
    # A line search may step far out.
    terms = np.exp(np.clip(theta[floor : floor + k] - u * alphas, -700, 700))
    least = np.exp(np.clip(theta[0], -700, 700)) if floor else 0.0
    total = least + terms.sum(axis=1)
    r = np.log(total) - target
    clipped = np.clip(r, -DELTA, DELTA)
    slope = clipped / total
    value = float(np.sum(np.where(np.abs(r) <= DELTA, 0.5 * r**2, DELTA * (np.abs(r) - 0.5 * DELTA))))
    gradient = np.concatenate([[least * slope.sum()] if floor else [], slope @ terms, -slope @ (terms * u)])
    return value, gradient
