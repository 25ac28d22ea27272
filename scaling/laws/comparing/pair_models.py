"""Two architectures under one law: y = E + A x^-alpha with any of E, A, alpha shared or separate.

Search space of the pair: (ln E, dE, ln A, dA, ln alpha, dalpha) with g = +1/2 for architecture a and -1/2 for
b,

    y = exp(ln E + dE g) + exp(ln A + dA g - exp(ln alpha + dalpha g) u),      u = centred ln x

so every nesting level is the same compiled program with some entries held at 0:

    shared     one curve                                            E, A, alpha
    shift      y = E + A (s x)^-alpha, one multiplier s of x        + dA
    exponents  shift and own exponents, common E                    + dalpha
    own        everything separate                                  + dE
    power      no floor, own A and alpha (a rival form)
    log_linear y = level - slope u per architecture (a rival form; its "exponent" is the slope)

Legend: n rows, b resampled fits, k clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special

from recscale.scaling.laws.fitting.problem import Problem, make_problem
from recscale.scaling.laws.fitting.solver import SHARE_ABSOLUTE, SHARE_RELATIVE, WARM, refine
from recscale.scaling.laws.fitting.starts import starting_points
from recscale.scaling.laws.forms.form import (
    ABSENT,
    EXPONENT_GRID,
    EXPONENT_RANGE,
    Family,
    Form,
    Linear,
    Parameter,
    Slot,
)
from recscale.scaling.laws.judgement import gates
from recscale.scaling.laws.uncertainty.bootstrap import cluster_counts

LEVELS = ("shared", "shift", "exponents", "own")
RIVALS = ("power", "log_linear")
_FREE = {
    "shared": (1, 0, 1, 0, 1, 0),
    "shift": (1, 0, 1, 1, 1, 0),
    "exponents": (1, 0, 1, 1, 1, 1),
    "own": (1, 1, 1, 1, 1, 1),
    "power": (0, 0, 1, 1, 1, 1),
    "log_linear": (1, 1, 1, 1),
}
_LEAST_SQUARES = 1e6  # a Huber width no residual reaches
_MIN_DISTINCT_CLUSTERS = 4  # a resample with fewer cannot determine three parameters per architecture
_RESTART_SPREAD = 0.3  # sd of the random restart in log parameters
_CLEARLY_WORSE = 0.01  # stricter than 5%: a true common floor must not be turned away one time in twenty


@dataclass(frozen=True)
class PairData:
    """Rows of two architectures, a first where it matters. All arrays [n].

    x: raw axis; y: metric (positive, lower is better); is_a: rows of a; clusters: code of the row's cluster.
    Where `matched`, the two architectures ran the same shapes and a code names one shape of both; otherwise
    codes of a and b are disjoint.
    """

    x: np.ndarray
    y: np.ndarray
    is_a: np.ndarray
    clusters: np.ndarray
    matched: bool

    @property
    def centre(self) -> float:
        """mean ln x over all rows: the origin of u."""
        return float(np.log(self.x).mean())

    @property
    def u(self) -> np.ndarray:
        return np.log(self.x) - self.centre

    @property
    def fewest_values(self) -> int:
        """Distinct values of the axis in the architecture that has fewer of them."""
        return min(len(np.unique(self.x[side])) for side in (self.is_a, ~self.is_a))

    def subset(self, keep: np.ndarray) -> PairData:
        """The rows under the mask `keep` [n]."""
        return PairData(self.x[keep], self.y[keep], self.is_a[keep], self.clusters[keep], self.matched)


@dataclass(frozen=True)
class PairFit:
    """One model of the pair: `phi` [p] is the optimum, `draws` [b, p] its resampled copies (empty without a
    bootstrap).

    `objective` is the Huber sum, `rss` the residual sum of squares of ln y at the least-squares optimum,
    `residuals` those residuals.
    """

    model: str
    phi: np.ndarray
    objective: float
    convergence_share: float
    rss: float
    residuals: np.ndarray
    draws: np.ndarray

    @property
    def free(self) -> int:
        return sum(_FREE[self.model])

    def constants(self, phi: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """E, A, alpha of each architecture at the centre: {"E_a": [...], ...}; for log_linear level and alpha
        (slope).
        """
        phi = self.phi if phi is None else phi
        result = {}
        for name, g in (("a", 0.5), ("b", -0.5)):
            if self.model == "log_linear":
                result[f"E_{name}"] = phi[..., 0] + phi[..., 1] * g
                result[f"alpha_{name}"] = phi[..., 2] + phi[..., 3] * g
                continue
            for i, letter in ((0, "E"), (2, "A"), (4, "alpha")):
                result[f"{letter}_{name}"] = np.exp(phi[..., i] + phi[..., i + 1] * g)
        return result

    def exponent_difference(self, phi: np.ndarray | None = None) -> np.ndarray:
        """alpha_a - alpha_b (for log_linear the difference of slopes)."""
        c = self.constants(phi)
        return c["alpha_a"] - c["alpha_b"]

    def log_shift(self, phi: np.ndarray | None = None) -> np.ndarray:
        """ln s of the shift model: y_a(x) = y_b(s x), so s > 1 means a needs s times less of x."""
        c = self.constants(phi)
        return (np.log(c["A_b"]) - np.log(c["A_a"])) / c["alpha_a"]

    def log_x_at(self, y: np.ndarray | float, phi: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """u at which each curve reaches metric y; +inf where y is at or below that curve's floor."""
        c = self.constants(phi)
        result = []
        for name in "ab":
            above = y - c[f"E_{name}"]
            with np.errstate(divide="ignore", invalid="ignore"):
                u = -(np.log(above) - np.log(c[f"A_{name}"])) / c[f"alpha_{name}"]
            result.append(np.where(above > 0, u, np.inf))
        return result[0], result[1]

    def predict(self, u: np.ndarray, is_a: np.ndarray) -> np.ndarray:
        """Metric at centred ln x for rows of either architecture."""
        form = _log_linear_form() if self.model == "log_linear" else _pair_form()
        return form.value(self.phi, _axes(u, is_a))


def fit_pair(data: PairData, model: str, *, delta: float = 1e-3) -> PairFit:
    """Fit one model of the pair (a name of LEVELS or RIVALS) by Huber on ln y, from the form's own starts.

    Raises ValueError for an unknown model.
    """
    if model not in _FREE:
        raise ValueError(f"no pair model {model!r}; one of {', '.join(_FREE)}")
    problem = _problem(data, model, delta)
    free = np.array(_FREE[model], float)
    batch = refine(problem, _starts(problem, model), free=free)
    best = int(np.argmin(batch.objective))
    limit = batch.objective[best] * (1 + SHARE_RELATIVE) + SHARE_ABSOLUTE * len(data.y)
    share = float(np.mean(batch.objective <= limit))
    squares = refine(_problem(data, model, _LEAST_SQUARES), batch.phi[best : best + 1], free=free)
    residuals = np.log(problem.form.value(squares.phi[0], problem.axes)) - np.log(data.y)
    none = np.empty((0, len(free)))
    objective = float(batch.objective[best])
    return PairFit(model, batch.phi[best], objective, share, float(residuals @ residuals), residuals, none)


def resampled(fit: PairFit, data: PairData, weights: np.ndarray, *, delta: float = 1e-3, seed: int = 0) -> PairFit:
    """The fit with `draws`: refits with row weights [b, n], each the better of a start at the optimum and a
    random one.
    """
    problem = _problem(data, fit.model, delta)
    free = np.array(_FREE[fit.model], float)
    rng = np.random.default_rng(seed + 1)
    count = len(weights)
    # Differences between the architectures restart where they are; levels and exponents move.
    moved = free * (np.arange(len(free)) % 2 == 0)
    away = fit.phi + moved * rng.normal(0.0, _RESTART_SPREAD, (count, len(free)))
    first, second = (
        refine(problem, start, free=free, weights=weights, control=WARM)
        for start in (np.tile(fit.phi, (count, 1)), away)
    )
    better = np.where(np.isfinite(second.objective), second.objective, np.inf) < first.objective
    return replace(fit, draws=np.where(better[:, None], second.phi, first.phi))


def nesting_p_value(small: PairFit, large: PairFit, clusters: np.ndarray) -> float:
    """p-value of an F-test that `small` is enough, rows counted at their effective number.

    Rows of one cluster are not independent: n is divided by 1 + (m - 1) rho, with rho the residuals'
    correlation inside a cluster.
    """
    n = len(large.residuals)
    effective = gates.effective_rows(large.residuals, clusters)
    extra, spare = large.free - small.free, effective - large.free
    # Below rounding both sums are noise of the arithmetic and prove nothing.
    tiny = 1e-26 * n
    if spare < 1 or small.rss <= tiny:
        return 1.0
    statistic = (small.rss - large.rss) / extra / (max(large.rss, tiny) / spare)
    return float(special.fdtrc(extra, spare, max(statistic, 0.0)))


def admissible(fit: PairFit, own: PairFit, clusters: np.ndarray) -> tuple[bool, str]:
    """Whether a model may carry a claim about exponents: solved, and not clearly worse than everything
    separate.
    """
    if fit.convergence_share < gates.MIN_CONVERGENCE:
        return False, f"only {fit.convergence_share:.0%} of the starts reached the best objective"
    if fit.model in ("shared", "shift"):
        return False, "has one exponent for both"
    if fit.model == "own":
        return True, ""
    p = nesting_p_value(fit, own, clusters)
    if p < _CLEARLY_WORSE:
        return False, f"rejected against separate curves (p = {p:.2g})"
    return True, ""


def resampling_weights(data: PairData, draws: int, seed: int) -> np.ndarray:
    """Row multiplicities [draws, n] of a cluster bootstrap, stratified by architecture.

    Matched designs resample the shared index once for both architectures; otherwise each architecture's
    clusters are resampled on their own. Draws with fewer than 4 distinct clusters (or all of them, if there
    are fewer) in an architecture are replaced.
    """
    rng = np.random.default_rng(seed)
    groups = [np.unique(data.clusters)]
    if not data.matched:
        groups = [np.unique(data.clusters[data.is_a]), np.unique(data.clusters[~data.is_a])]
    counts = np.zeros((draws, int(data.clusters.max()) + 1))
    for group in groups:
        needed = min(_MIN_DISTINCT_CLUSTERS, len(group))
        drawn = cluster_counts(len(group), draws, rng)
        while (poor := (drawn > 0).sum(axis=1) < needed).any():
            drawn[poor] = cluster_counts(len(group), int(poor.sum()), rng)
        counts[:, group] = drawn
    return counts[:, data.clusters]


def leave_one_out_weights(data: PairData) -> np.ndarray:
    """Row weights [k, n] that leave out one cluster at a time."""
    codes = np.unique(data.clusters)
    return (data.clusters[None, :] != codes[:, None]).astype(float)


def rolling_origin_error(
    data: PairData, models: tuple[str, ...], *, delta: float = 1e-3, cuts: int = 5
) -> dict[str, float | None]:
    """Mean over cuts of the rms error of ln y beyond the cut, per model; None where no cut has enough rows.

    Cuts are log-spaced at 45-85% of the range of x; a cut trains on x <= cut, tests on (cut, 30 cut], and
    needs max(8, 2 parameters) training rows and 3 test rows.
    """
    log_x = np.log(data.x)
    places = log_x.min() + np.linspace(0.45, 0.85, cuts) * np.ptp(log_x)
    train = log_x[None, :] <= places[:, None]
    test = ~train & (log_x[None, :] <= places[:, None] + np.log(30.0))
    result: dict[str, float | None] = {}
    for model in models:
        free = np.array(_FREE[model], float)
        enough = (train.sum(1) >= max(8, 2 * int(free.sum()))) & (test.sum(1) >= 3)
        if not enough.any():
            result[model] = None
            continue
        problem = _problem(data, model, delta)
        errors = []
        for row in np.flatnonzero(enough):
            starts = _starts(problem, model)
            ends = refine(problem, starts, free=free, weights=train[row].astype(float))
            fitted = problem.form.value(ends.phi[int(np.argmin(ends.objective))], problem.axes)
            error = np.log(fitted[test[row]]) - np.log(data.y[test[row]])
            errors.append(float(np.sqrt(np.mean(error**2))))
        result[model] = float(np.mean(errors))
    return result


def _axes(u: np.ndarray, is_a: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(u, float), np.where(is_a, 0.5, -0.5)], axis=1)


def _problem(data: PairData, model: str, delta: float) -> Problem:
    form = _log_linear_form() if model == "log_linear" else _pair_form()
    return make_problem(form, _axes(data.u, data.is_a), data.y, delta=delta)


def _starts(problem: Problem, model: str) -> np.ndarray:
    """Grid starts of the pair, with the entries a model holds fixed set to their value."""
    starts = starting_points(problem, problem.weights)
    fixed = np.array(_FREE[model]) == 0
    starts[:, fixed] = 0.0
    if model == "power":
        starts[:, 0] = ABSENT
        # Without a floor the level carries the whole metric and the exponent is small.
        starts[:, 2] = np.log(np.median(problem.y))
        starts[:, 4] = np.log(np.geomspace(1e-3, 0.3, len(starts)))
    return starts


def _pair_value(theta, axes, xp):
    u, g = axes[:, 0], axes[:, 1]
    floor = xp.exp(theta[0] + theta[1] * g)
    return floor + xp.exp(theta[2] + theta[3] * g - xp.exp(theta[4] + theta[5] * g) * u)


def _log_linear_value(theta, axes, xp):
    u, g = axes[:, 0], axes[:, 1]
    return theta[0] + theta[1] * g - (theta[2] + theta[3] * g) * u


_PAIR_NAMES = ("E", "dE", "A", "dA", "alpha", "dalpha")
_PAIR_FAMILY = Family("pair_power_offset", _PAIR_NAMES, _pair_value)
_LOG_LINEAR_NAMES = ("level", "dlevel", "slope", "dslope")
_LOG_LINEAR_FAMILY = Family("pair_log_linear", _LOG_LINEAR_NAMES, _log_linear_value)
_SLOTS = (Slot("x", "train_flops"), Slot("g", "architecture", transform="linear"))


def _pair_starts(axes: np.ndarray, y: np.ndarray, _: np.random.Generator) -> dict[str, np.ndarray]:
    """Starts with one exponent for both: exact non-negative coefficients at the better half of the exponent
    grid.
    """
    u, g = axes[:, 0], axes[:, 1]
    found = []
    for alpha in EXPONENT_GRID:
        term = np.exp(-alpha * u)
        design = np.stack([np.ones_like(u), term * (g > 0), term * (g < 0)], axis=1) / y[:, None]
        (floor, a, b), miss = optimize.nnls(design, np.ones_like(y))
        found.append((miss, floor, max(a, 1e-12), max(b, 1e-12), alpha))
    found.sort()
    _, floor, a, b, alpha = np.array(found[: len(found) // 2]).T
    zero = np.zeros_like(a)
    # A floor solved to zero restarts small but visible, so the refinement can bring it back.
    floor = np.maximum(floor, 1e-3 * np.median(y))
    return {"E": floor, "dE": zero, "A": np.sqrt(a * b), "dA": np.log(a / b), "alpha": alpha, "dalpha": zero}


def _pair_form() -> Form:
    difference = {"role": "slope", "low": -20.0, "high": 20.0, "searched": "real"}
    parameters = (
        Parameter("E", "floor", 1e-9, 2.0, scale="target"),
        Parameter("dE", **difference),
        Parameter("A", "coefficient", 1e-12, 1e6, scale="target"),
        Parameter("dA", **difference),
        Parameter("alpha", "exponent", *EXPONENT_RANGE),
        Parameter("dalpha", **difference),
    )
    return Form(
        "pair_power_offset", (), "y = E + A x^-alpha per architecture", "this module", _SLOTS, parameters,
        _PAIR_FAMILY, starts=_pair_starts,
    )  # fmt: skip


def _log_linear_columns(exponents, axes):
    u, g = axes[:, 0], axes[:, 1]
    return [np.ones((1, len(u))), g[None], -u[None], (-u * g)[None]]


def _log_linear_form() -> Form:
    parameters = tuple(
        Parameter(name, "level" if "level" in name else "slope", -1e6, 1e6, "real", "target")
        for name in _LOG_LINEAR_NAMES
    )
    linear = Linear((), _LOG_LINEAR_NAMES, _log_linear_columns, (True,) * 4)
    return Form(
        "pair_log_linear", (), "y = level - slope ln x per architecture", "this module", _SLOTS, parameters,
        _LOG_LINEAR_FAMILY, linear,
    )  # fmt: skip
