"""Which runs would narrow the law most: expected widths of the fitted constants, and of each candidate next run.

A law fitted to cells (one shape each, k-th with n_k seeds) has the Fisher information

    M = sum_k w_k J_k J_k',   w_k = 1 / (b^2 + s^2 / n_k),   J_k = d ln y / d parameters at the cell,

with the variance s^2 of repeated seeds and b^2 of shapes around the law, both from the residuals. The expected 95 %
half-width of a constant is t sqrt((M^-1)_jj). A run is worth the rise of ln det M (a D-optimal design) or, towards a
goal, the fall of the log variance of that constant; a plan takes the best run per core-hour again and again.

A fit does not know the noise but estimates it, from few shapes, so that its interval may well be a third wider or
narrower than expected. A goal counts as reached at the width that four of five such tables stay below: residuals of the
planned rows are simulated and given to the variances that the fit itself has (`uncertainty.curvature`).

The widths are local: taken at the fitted constants, where the law is linear in them. Wide ones are orders of magnitude.
They suppose that the law holds at every size that is offered. Larger runs than those fitted promise most, and ask
whether the law goes on: where it bends, they widen the interval. So they are offered on request alone.

Legend: c candidate cells (those that were run among them), d axes, p free parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import numpy as np
import pandas as pd
from scipy import optimize, special

from recscale.scaling.laws.fitting.law_fit import LawFit
from recscale.scaling.laws.fitting.problem import Problem, residuals
from recscale.scaling.laws.tables.validate import require
from recscale.scaling.laws.uncertainty.curvature import Spread, axis_levels, groupings

_STEP = 1e-5
BEYOND = 1.0  # how far above the largest value of an axis a run is offered: further up the law is a guess
_LONGEST_PLAN = 1000  # runs
_LEAST_WORTH = 1e-3  # below this a run says nothing that is not known
_RATIO_BEYOND = 4.0  # how far the ratio of two axes may lie beyond those that were run
_LIKELY, _TABLES = 0.8, 100  # share of simulated tables whose interval is no wider; how many of them
_WIDE = ("floor", "exponent", "shape")  # roles whose widths are reported
MAX_SEEDS = 4


@dataclass(frozen=True)
class Cost:
    """Seconds of a run on one core: rows x (fixed + per_size . sizes), fitted to measured seconds per row."""

    rows: float | None
    fixed: float
    per_size: Mapping[str, float]
    data: str | None

    def hours(self, point: Mapping[str, float]) -> float:
        """Core-hours at axis values by column."""
        rows = point[self.data] if self.data is not None else self.rows or 1.0
        each = self.fixed + sum(rate * point[column] for column, rate in self.per_size.items())
        return rows * each / 3600.0


def measured_cost(
    table: pd.DataFrame, columns: Sequence[str], data: str = "examples", speed: float | None = None
) -> Cost:
    """The cost of a run along these axes from `rows_per_s`, or `wall_s` and `data`, of the runs of a table.

    speed: FLOP/s of a core (or of whatever the hours are of); then a run costs 6 FLOPs per parameter and row, and
    nothing is read from the table. Raises ValueError where the table does not say how long its runs took.
    """
    require(table, data, "the rows a run was trained on")
    rows, axis = table[data].to_numpy(float), data if data in columns else None
    if speed is not None:
        sizes = [column for column in columns if column != data]
        if len(sizes) != 1:
            raise ValueError(f"a speed prices one size and the data, found {', '.join(columns)}")
        return Cost(float(np.median(rows)), 0.0, {sizes[0]: 6.0 / speed}, axis)
    if "rows_per_s" in table and table["rows_per_s"].notna().any():
        per_row = 1.0 / table["rows_per_s"].to_numpy(float)
    elif "wall_s" in table and table["wall_s"].notna().any():
        per_row = table["wall_s"].to_numpy(float) / rows
    else:
        raise ValueError("the table has neither rows_per_s nor wall_s, so the next runs have no price; give a speed")
    sizes = [column for column in columns if column != data]
    known = np.isfinite(per_row) & np.isfinite(rows)
    design = np.column_stack([np.ones(len(table)), *(table[column].to_numpy(float) for column in sizes)])[known]
    scale = design.max(axis=0)
    rates, _ = optimize.nnls(design / scale / per_row[known, None], np.ones(int(known.sum())))
    fixed, *each = (float(rate) for rate in rates / scale)
    return Cost(float(np.median(rows)), fixed, dict(zip(sizes, each, strict=True)), axis)


@dataclass(frozen=True)
class Design:
    """The runs of one law and those that may come next; see the module docstring.

    points[c, d]: raw axis values; counts[c]: seeds run there, 0 for what is only offered; hours[c]: core-hours a run.
    slopes[c, p]: J. between, within: b^2 and s^2 of ln y (or of y over its unit).
    """

    name: str
    law: LawFit
    between: float
    within: float
    points: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)
    hours: np.ndarray = field(repr=False)
    slopes: np.ndarray = field(repr=False)

    def widths(self) -> dict[str, float]:
        """Expected 95 % half-width of floor, exponents and shapes, in their own units; inf where undetermined."""
        variance = np.diag(self._covariance())
        return {
            parameter.name: float(self._width(parameter.name, variance[i], self._spare))
            for i, parameter in enumerate(self.law.form.parameters)
            if parameter.role in _WIDE
        }

    def likely_width(self, name: str) -> float:
        """Half-width of a constant that four of five such tables stay below, as `fit` would state it."""
        if self._spare < 1:
            return float("inf")
        form, cells = self.law.form, np.repeat(np.arange(len(self.counts)), self.counts)
        axes, slopes = np.log(self.points[cells]), self.slopes[cells]
        owners = [parameter.slots for parameter in form.parameters]
        groups = groupings(form.axes, owners, axes, axis_levels(axes[:, 0]))
        draw = np.random.default_rng(0)
        noise = self.between**0.5 * draw.standard_normal((_TABLES, len(self.counts)))[:, cells]
        noise += self.within**0.5 * draw.standard_normal(noise.shape)
        base = np.linalg.qr(slopes)[0]
        contrast = (np.array(form.names) == name).astype(float)
        left = noise - (noise @ base) @ base.T
        reach = [Spread(slopes, residual, groups).squared_reach(contrast) for residual in left]
        return float(self._scale(name) * np.sqrt(np.quantile(reach, _LIKELY)))

    def reaches(self, name: str, width: float) -> bool:
        """Whether the interval of a constant will be so narrow, in four of five tables."""
        return self.widths()[name] <= width and self.likely_width(name) <= width

    def with_run(self, run: int) -> Design:
        """The design with one more seed at a candidate."""
        counts = self.counts.copy()
        counts[run] += 1
        return replace(self, counts=counts)

    def gains(self, goal: str | None = None) -> np.ndarray:
        """What one more seed at each candidate is worth [c]: the rise of ln det M, or twice the fall of the log width
        of the goal's constant; nothing at cells that have their seeds.
        """
        covariance = self._covariance()
        more = self._weights(self.counts + 1) - self._weights(self.counts)
        towards = self.slopes @ covariance
        leverage = more * np.einsum("cp,cp->c", towards, self.slopes)
        worth = np.log1p(leverage)
        if goal is not None and self._spare > 0:
            i = self.law.form.names.index(goal)
            after = covariance[i, i] - more * towards[:, i] ** 2 / (1 + leverage)
            spare = self._spare + (self.counts == 0)
            before = self._width(goal, covariance[i, i], self._spare)
            worth = 2 * np.log(before / self._width(goal, np.maximum(after, 1e-300), spare))
        return np.where((self.counts < MAX_SEEDS) & (worth > _LEAST_WORTH), worth, 0.0)

    @property
    def _spare(self) -> int:
        """Degrees of freedom: cells that were run less parameters."""
        return int(np.count_nonzero(self.counts)) - len(self.law.form.names)

    def _weights(self, counts: np.ndarray) -> np.ndarray:
        return np.where(counts > 0, 1.0 / (self.between + self.within / np.maximum(counts, 1)), 0.0)

    def _covariance(self) -> np.ndarray:
        information = (self.slopes * self._weights(self.counts)[:, None]).T @ self.slopes
        return np.linalg.pinv(information, rcond=1e-14, hermitian=True)

    def _width(self, name: str, variance: np.ndarray | float, spare: np.ndarray | int) -> np.ndarray:
        """Half-width in the constant's own unit from a variance in search space."""
        quantile, spare = special.stdtrit(np.maximum(spare, 1), 0.975), np.asarray(spare)
        return np.where(spare > 0, quantile * self._scale(name) * np.sqrt(np.maximum(variance, 0.0)), np.inf)

    def _scale(self, name: str) -> float:
        """A constant's own unit for one of the search space, at its fitted value."""
        phi = self.law.solved()[1].phi[self.law.form.names.index(name)]
        return float(np.exp(phi)) if self.law.form[name].searched == "log" else 1.0


def designed(name: str, law: LawFit, cost: Cost, most_hours: float, beyond: float = BEYOND) -> Design:
    """The design that a fit has, with the runs of at most so many core-hours that may come next.

    Candidates: more seeds of what there is, sizes between neighbours, and values up to `beyond` times the largest, in
    the steps of the ladder. Raises Refused for a fit of which nothing may be read, ValueError for a form whose axes are
    no resources, or where a coefficient or exponent ran to the end of its search: then no local width means anything.
    """
    problem, solution = law.solved()
    if any(slot.transform != "log" for slot in law.form.slots) or law.form.streams:
        raise ValueError(f"form {law.form.id} has an axis that is no resource; design its base form")
    curved = {p.name for p in law.form.parameters if p.role in ("coefficient", "exponent")}
    ended = [g.reason for g in law.refusals if g.id == "bound" and set(g.refuses) & curved]
    if ended:
        raise ValueError(f"{name}: {'; '.join(ended)}, so no next run can be judged from this fit; run a wider range")
    run, cells = np.unique(law.rows.stacked, axis=0, return_inverse=True)
    between, within = _noise(problem, solution.phi, cells.ravel(), len(law.form.names))
    columns = [law.rows.columns[slot] for slot in law.form.axes]
    offered = _candidates(run, beyond)
    hours = np.array([cost.hours(dict(zip(columns, point, strict=True))) for point in offered])
    offered = offered[hours <= most_hours]
    points, first = np.unique(np.concatenate([run, offered]), axis=0, return_index=True)
    counts = np.where(first < len(run), np.append(np.bincount(cells.ravel()), 0)[np.minimum(first, len(run))], 0)
    hours = np.array([cost.hours(dict(zip(columns, point, strict=True))) for point in points])
    return Design(name, law, between, within, points, counts, hours, _slopes(law, points))


def planned(design: Design, points: np.ndarray, name: str) -> Design:
    """The design of runs that are only planned, one row of `points` [n, d] each, if they obey the law of another."""
    cells, counts = np.unique(points, axis=0, return_counts=True)
    hours = np.full(len(cells), np.nan)
    return replace(design, name=name, points=cells, counts=counts, hours=hours, slopes=_slopes(design.law, cells))


def _noise(problem: Problem, phi: np.ndarray, cells: np.ndarray, free: int) -> tuple[float, float]:
    """(variance of cells around the law, variance of repeated seeds) from residuals, by analysis of variance."""
    r = residuals(problem, phi)
    counts = np.bincount(cells)
    means = np.bincount(cells, r) / counts
    repeats = len(r) - len(counts)
    within = float(np.sum((r - means[cells]) ** 2)) / repeats if repeats else 0.0
    around = float(np.sum(counts * means**2)) / max(len(counts) - free, 1)
    typical = float(np.mean(counts))
    between = max((around - within) / typical, 0.0) if repeats else around
    tiny = 1e-16  # noise-free data have no width, and no inverse
    return between, max(within, tiny)


def _slopes(law: LawFit, points: np.ndarray) -> np.ndarray:
    """d ln y / d searched parameters [c, p] at raw axis values, by central differences."""
    problem, solution = law.solved()
    centre = np.array([law.centre[slot] for slot in law.form.axes])
    axes, columns = np.log(points) - centre, []
    for i in range(len(law.form.names)):
        ends = []
        for step in (_STEP, -_STEP):
            phi = solution.phi.copy()
            phi[i] += step
            value = law.form.value(phi, axes)
            ends.append(np.log(value) if problem.kind == "log" else value / np.median(problem.unit))
        columns.append((ends[0] - ends[1]) / (2 * _STEP))
    return np.stack(columns, axis=1)


def _candidates(run: np.ndarray, farthest: float) -> np.ndarray:
    """Axis values of runs that may come next [c, d], from those that were run."""
    grids = []
    for values in run.T:
        distinct = np.unique(values)
        steps = np.diff(np.log(distinct))
        step = float(np.exp(np.median(steps))) if len(distinct) > 1 else 2.0
        # Quarters of each step of the ladder; of several axes the grid is large enough.
        parts = np.array([0.25, 0.5, 0.75])[:, None] if run.shape[1] == 1 else np.empty((0, 1))
        inside = np.sort((distinct[:-1] ** (1 - parts) * distinct[1:] ** parts).ravel())
        beyond = distinct[-1] * step ** np.arange(1, 1 + int(np.log(farthest) / np.log(max(step, 1.2))))
        grids.append([*distinct, *(float(f"{value:.3g}") for value in (*inside, *beyond))])
    offered = np.array(list(product(*grids)))
    for i, j in combinations(range(run.shape[1]), 2):
        known, wanted = run[:, i] / run[:, j], offered[:, i] / offered[:, j]
        near = (wanted > known.min() / _RATIO_BEYOND) & (wanted < known.max() * _RATIO_BEYOND)
        offered = offered[near]
    return offered


@dataclass(frozen=True)
class Step:
    """One run of a plan: of which design, where (axis values), and its core-hours."""

    name: str
    point: tuple[float, ...]
    hours: float


@dataclass(frozen=True)
class Plan:
    """Runs in the order they were chosen, the designs with them, and whether the goal was reached (None without)."""

    runs: tuple[Step, ...]
    designs: tuple[Design, ...]
    reached: bool | None

    @property
    def hours(self) -> float:
        """Core-hours of all runs."""
        return sum(run.hours for run in self.runs)


def plan(designs: Sequence[Design], budget: float, goal: tuple[str, float] | None = None) -> Plan:
    """Adds the run that is worth most per core-hour until the budget (core-hours) is spent or every law reaches the
    goal, a constant's name and half-width.
    """
    name = None if goal is None else goal[0]
    current, runs, left = list(designs), [], budget
    wanting = [goal is None or not design.reaches(*goal) for design in designs]
    while len(runs) < _LONGEST_PLAN:
        best: tuple[float, int, int] | None = None
        for k, design in enumerate(current):
            if not wanting[k]:
                continue
            rate = np.where(design.hours <= left, design.gains(name) / design.hours, 0.0)
            top = int(np.argmax(rate))
            if rate[top] > 0 and (best is None or rate[top] > best[0]):
                best = (float(rate[top]), k, top)
        if best is None:
            break
        _, k, top = best
        design = current[k]
        runs.append(Step(design.name, tuple(map(float, design.points[top])), float(design.hours[top])))
        left -= float(design.hours[top])
        current[k] = design.with_run(top)
        wanting[k] = goal is None or not current[k].reaches(*goal)
    return Plan(tuple(runs), tuple(current), None if goal is None else not any(wanting))


def differences(designs: Sequence[Design]) -> dict[tuple[str, str], float]:
    """Expected half-width of the difference of first exponents of every pair of laws fitted apart, seeds not paired."""
    found = {}
    for a, b in combinations(designs, 2):
        name = next(p.name for p in a.law.form.parameters if p.role == "exponent")
        found[a.name, b.name] = float(np.hypot(a.widths()[name], b.widths()[name]))
    return found
