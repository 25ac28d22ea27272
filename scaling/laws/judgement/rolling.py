"""Extrapolation is scored, not assumed: rolling origin, coverage by ratio, conformal widening, and the
ladder's two ends.

At each of five cuts of an axis every form is fitted to the rows up to the cut and scored on those in (cut, 30
cut]. Forms are ranked by the mean of their held-out errors; in-sample criteria never decide. All cuts of a
form share one compiled program, because rows are left out by weight.

Legend: n rows, b draws, p parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from recscale.scaling.laws.fitting.fit import codes_of, fit, problem_of
from recscale.scaling.laws.fitting.law_fit import LawFit, Refused
from recscale.scaling.laws.fitting.problem import Problem, residuals
from recscale.scaling.laws.fitting.solver import Control, Solution, solve
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.tables.validate import require
from recscale.scaling.laws.uncertainty.bootstrap import bootstrap, cluster_counts
from recscale.scaling.records.plain import plain

from .gates import MIN_CLUSTERS

CUTS = 5
CUT_RANGE = (0.45, 0.85)
REACH = 30.0
MIN_TRAIN, MIN_TEST = 8, 3
LEVELS = (0.5, 0.8, 0.95)
RATIO_EDGES = (1.0, 3.0, 10.0, 30.0)
RATIO_NAMES = ("<=3x", "3-10x", "10-30x")
MIN_CALIBRATION = 10
BASELINES = ("last_value", "log_linear_baseline")
# Held-out errors are read to two or three digits; refits need not chase the last one.
_REFIT = Control(limit=200, tolerance=1e-10, calm=3, polish=False)


@dataclass(frozen=True)
class Rolling:
    """Held-out scores of several forms on one table.

    scores: form, cut, train, test, rms and bias of ln yhat - ln y.
    points: one row per held-out point with error, ratio beyond the cut and interval ends.
    fits: form -> fit of all rows. refused: form -> why it was not ranked.
    """

    axis: str
    cuts: tuple[float, ...]
    scores: pd.DataFrame
    points: pd.DataFrame
    fits: dict[str, LawFit] = field(repr=False)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def ranking(self) -> pd.DataFrame:
        """Forms and baselines by mean held-out rms: mean, worst, bias, cuts, and the weight in a forecast.

        Baselines have no weight. Only cuts at which every form could be scored count, so no form is ranked
        on easier ground than another.
        """
        if self.scores.empty:
            return pd.DataFrame(columns=["mean_rms", "worst_rms", "bias", "cuts", "weight"])
        shared = self.scores.groupby("cut")["form"].nunique()
        scores = self.scores[self.scores["cut"].isin(shared[shared == shared.max()].index)]
        grouped = scores.groupby("form")
        found = pd.DataFrame(
            {
                "mean_rms": grouped["rms"].mean(),
                "worst_rms": grouped["rms"].max(),
                "bias": grouped["bias"].mean(),
                "cuts": grouped["cut"].count(),
            }
        )
        precision = 1.0 / grouped["rms"].apply(lambda r: np.mean(r**2)).clip(lower=1e-30)
        precision.loc[precision.index.isin(BASELINES)] = 0.0
        found["weight"] = precision / precision.sum() if precision.sum() > 0 else precision
        return found.sort_values("mean_rms", kind="stable")

    @property
    def best(self) -> str | None:
        """The form with the lowest mean held-out error; None when nothing was scored or a baseline wins."""
        ranking = self.ranking
        return None if ranking.empty or ranking.index[0] in BASELINES else str(ranking.index[0])

    @property
    def coverage(self) -> pd.DataFrame:
        """Share of held-out points inside nominal intervals, per form, extrapolation ratio and level, with
        the count.
        """
        rows = []
        known = self.points.dropna(subset=["low_95"]) if len(self.points) else self.points
        for (form, ratio), group in known.groupby(["form", "ratio_bin"], sort=False) if len(known) else ():
            for level in LEVELS:
                low, high = (group[f"{end}_{round(100 * level)}"] for end in ("low", "high"))
                inside = (group["actual"] >= low) & (group["actual"] <= high)
                rows.append((form, ratio, level, float(inside.mean()), len(group)))
        return pd.DataFrame(rows, columns=["form", "ratio", "level", "coverage", "points"])

    def widening(self, form: str, level: float = 0.95) -> dict[str, float | None]:
        """Conformal factor on the 95% half-width per ratio bin; None ("uncalibrated") with too few held-out
        errors.

        The factor is the ceil((n + 1) level)-th smallest |error| / half-width, so n must be at least level /
        (1 - level), and ten in any case.
        """
        factors: dict[str, float | None] = {}
        for name in RATIO_NAMES:
            group = self.points
            if len(group):
                group = group[(group["form"] == form) & (group["ratio_bin"] == name)].dropna(subset=["low_95"])
            if len(group) < MIN_CALIBRATION:
                factors[name] = None
                continue
            half = np.maximum(0.5 * (group["high_95"] - group["low_95"]).to_numpy(), 1e-300)
            score = np.sort(np.abs(group["error"].to_numpy()) / half)
            place = int(np.ceil((len(score) + 1) * level))
            factors[name] = float(score[place - 1]) if place <= len(score) else None
        return factors

    def forecast(self, axes: Mapping[str, ArrayLike], *, beyond_range: bool = False) -> dict:
        """Weighted mean forecast over the ranked forms, with the spread between forms beside it.

        Returns mean, low and high over forms (not an interval of the noise), and per-form predictions and
        weights.
        """
        ranking = self.ranking
        weights = {str(name): w for name, w in ranking["weight"].items() if w > 0 and name in self.fits}
        if not weights:
            raise Refused("no form could be ranked by held-out error, so there is no forecast")
        each = {name: self.fits[name].predict(axes, beyond_range=beyond_range) for name in weights}
        stacked = np.stack([np.asarray(value, float) for value in each.values()])
        shares = np.array(list(weights.values())) / sum(weights.values())
        mean = np.tensordot(shares, stacked, axes=1)
        return {
            "mean": mean[()],
            "low": stacked.min(axis=0)[()],
            "high": stacked.max(axis=0)[()],
            "forms": each,
            "weights": dict(zip(weights, shares.tolist(), strict=True)),
        }

    def record(self) -> dict:
        """Plain data for a fit record's validation section."""
        return plain(
            {
                "axis": self.axis,
                "cuts": list(self.cuts),
                "scores": self.scores.to_dict("records"),
                "ranking": self.ranking.reset_index(names="form").to_dict("records"),
                "coverage": self.coverage.to_dict("records"),
                "widening": {name: self.widening(name) for name in self.fits},
                "best": self.best,
                "refused": self.refused,
            }
        )


def rolling_origin(
    frame: pd.DataFrame,
    candidates: Sequence[str | Form],
    axes: Mapping[str, str] | None = None,
    target: str | None = None,
    *,
    axis: str | None = None,
    cluster: str | None = None,
    cuts: int = CUTS,
    draws: int = 200,
    **options,
) -> Rolling:
    """Score forms on larger runs than they were fitted to.

    candidates: form ids. axes: slot -> column, shared by all forms (each takes the slots it has; one-axis
    forms take `x`, else the cut axis). axis: column the cuts are made on; None is train_flops, else the
    product of the axes (largest runs last). draws: resampled refits per cut for coverage, 0 for none. options
    go to `fit`.
    """
    frame = frame.reset_index(drop=True)
    axis, frame = _with_cut_axis(frame, axes, axis)
    fits, refused, scores, points, cut_values = {}, {}, [], [], ()
    for candidate in candidates:
        form_axes = _axes_for(candidate, axes, axis)
        law = fit(frame, candidate, form_axes, target, bootstrap=0, cluster=cluster, **{**options, "profile": False})
        name = law.form.id if law.form.id not in fits else f"{law.form.id}_{len(fits)}"
        if law.refused:
            refused[name] = "; ".join(g.reason for g in law.refusals if "*" in g.refuses)
            continue
        fits[name] = law
        values = law.rows.frame[axis].to_numpy(float)
        cut_values = cut_values or _cut_values(values, cuts)
        for cut in cut_values:
            outcome = _score(law, name, values, cut, draws)
            if outcome is not None:
                scores.append(outcome[0])
                points += outcome[1]
    if fits:
        any_fit = next(iter(fits.values()))
        scores += _baselines(any_fit, any_fit.rows.frame[axis].to_numpy(float), cut_values)
    return Rolling(
        axis,
        cut_values,
        pd.DataFrame(scores, columns=["form", "cut", "train", "test", "rms", "bias"]),
        pd.DataFrame(points, columns=_POINT_COLUMNS),
        fits,
        refused,
    )


_POINT_COLUMNS = [
    "form",
    "cut",
    "run_id",
    "ratio",
    "ratio_bin",
    "actual",
    "predicted",
    "error",
    *(f"{end}_{round(100 * level)}" for level in LEVELS for end in ("low", "high")),
]


def _with_cut_axis(frame: pd.DataFrame, axes: Mapping[str, str] | None, axis: str | None) -> tuple[str, pd.DataFrame]:
    """The column cuts are made on, added to the table when it is a product of axes."""
    if axis is not None:
        require(frame, axis, "the rolling-origin axis")
        return axis, frame
    if "train_flops" in frame.columns:
        return "train_flops", frame
    columns = list(dict.fromkeys((axes or {"N": "dense_params", "D": "examples"}).values()))
    present = [column for column in columns if column in frame.columns]
    if not present:
        require(frame, columns[0], "the rolling-origin axis")
    if len(present) == 1:
        return present[0], frame
    name = " x ".join(present)
    return name, frame.assign(**{name: frame[present].astype(float).prod(axis=1)})


def _axes_for(candidate: str | Form, axes: Mapping[str, str] | None, axis: str) -> Mapping[str, str] | None:
    """The part of `axes` a form understands; a one-axis form without a slot of its own reads the cut axis."""
    named = tuple(axes) if axes else None
    form = registry.get(candidate, named)
    known = {key for slot in form.slots for key in (slot.name, *slot.aliases)}
    if len(form.slots) == 1:
        slot = form.slots[0].name
        return (
            {slot: axes[slot]}
            if axes and slot in axes
            else {slot: next(iter(axes.values())) if axes and len(axes) == 1 else axis}
        )
    return None if axes is None else {key: column for key, column in axes.items() if key in known}


def _cut_values(values: np.ndarray, cuts: int) -> tuple[float, ...]:
    """Cuts log-spaced between 45% and 85% of the axis range."""
    low, high = np.log(values.min()), np.log(values.max())
    return tuple(float(np.exp(low + share * (high - low))) for share in np.linspace(*CUT_RANGE, cuts))


def _split(values: np.ndarray, cut: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks of training rows (<= cut) and test rows (in (cut, 30 cut])."""
    edge = cut * (1 + 1e-12)
    return values <= edge, (values > edge) & (values <= REACH * edge)


def fit_part(law: LawFit, mask: np.ndarray) -> tuple[Problem, Solution, np.ndarray]:
    """The law's form fitted to some of its rows: (problem, solution, weights[n] with the others at 0)."""
    problem, _ = problem_of(law.form, law.rows, law.settings)
    if law.problem is not None:
        problem = replace(problem, unit=law.problem.unit, pull=law.problem.pull)
    weights = problem.weights * (np.tile(mask, 2) if law.form.streams else mask)
    return problem, solve(problem, weights, _REFIT), weights


def _score(law: LawFit, name: str, values: np.ndarray, cut: float, draws: int):
    """(score row, point rows) of one form at one cut, or None with too few rows on either side."""
    train, test = _split(values, cut)
    if train.sum() < max(MIN_TRAIN, 2 * len(law.form.names)) or test.sum() < MIN_TEST:
        return None
    problem, solution, weights = fit_part(law, train)
    which, predicted, actual, error = _held_out(law, problem, solution, test)
    bands = _bands(law, problem, solution, weights, which, draws) if draws else None
    ratio = values[test] / values[train].max()
    bins = np.clip(np.searchsorted(RATIO_EDGES, ratio, side="left") - 1, 0, len(RATIO_NAMES) - 1)
    rows = []
    for i, run in enumerate(np.flatnonzero(test)):
        ends = [float(b[i]) for pair in bands for b in pair] if bands is not None else [np.nan] * (2 * len(LEVELS))
        numbers = [float(actual[i]), float(predicted[i]), float(error[i]), *ends]
        rows.append([name, cut, law.rows.run_ids[run], float(ratio[i]), RATIO_NAMES[bins[i]], *numbers])
    return _score_row(name, cut, train, test, error), rows


def _held_out(law: LawFit, problem: Problem, solution: Solution, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """(mask over the problem's rows, predicted, actual, error) of held-out `rows` [n] of the table.

    Metrics and their errors are in logarithms where all are positive.
    """
    which = np.concatenate([rows, np.zeros_like(rows)]) if law.form.streams else rows
    predicted, actual = law.form.value(solution.phi, problem.axes[which]), problem.y[which]
    if np.all(actual > 0):
        return which, np.log(predicted), np.log(actual), np.log(predicted / actual)
    return which, predicted, actual, predicted - actual


def _spread(error: np.ndarray) -> dict[str, float]:
    return {"rms": float(np.sqrt(np.mean(error**2))), "bias": float(np.mean(error))}


def _score_row(name: str, cut: float, train: np.ndarray, test: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    return {"form": name, "cut": cut, "train": int(train.sum()), "test": int(test.sum()), **_spread(error)}


def _bands(law: LawFit, problem: Problem, solution: Solution, weights: np.ndarray, which: np.ndarray, draws: int):
    """Per level the (low, high) of new runs: resampled clusters of the training rows plus their resampled
    residuals.
    """
    codes, used = codes_of(law.form, law.rows), weights > 0
    present = np.unique(codes[used])
    if len(present) < MIN_CLUSTERS:
        return None
    generator = np.random.default_rng(law.settings.seed + 11)
    counts = np.zeros((draws, int(codes.max()) + 1))
    counts[:, present] = cluster_counts(len(present), draws, generator)
    drawn = bootstrap(problem, solution, codes, draws, law.settings.seed, counts=counts, weights=weights, restart=False)
    curves = np.stack([law.form.value(phi, problem.axes[which]) for phi in drawn])
    own = residuals(problem, solution.phi)[used]
    noise = generator.choice(own, size=curves.shape)
    unit = problem.unit[which]
    curves = np.log(curves) - noise if problem.kind == "log" else curves - noise * unit
    if problem.kind != "log" and np.all(problem.y[which] > 0):
        curves = np.log(np.maximum(curves, 1e-300))
    return [np.percentile(curves, [50 * (1 - level), 50 * (1 + level)], axis=0) for level in LEVELS]


def _baselines(law: LawFit, values: np.ndarray, cuts: Sequence[float]) -> list[dict[str, Any]]:
    """Scores of two rivals no form may lose to: the largest run's value, and y linear in the log of the cut
    axis.
    """
    y, rows = law.rows.y, []
    logs = np.log(values)
    for cut in cuts:
        train, test = _split(values, cut)
        if train.sum() < MIN_TRAIN or test.sum() < MIN_TEST:
            continue
        slope, level = np.polyfit(logs[train], y[train], 1)
        guesses = {
            "last_value": np.full(test.sum(), y[train][np.argmax(values[train])]),
            "log_linear_baseline": level + slope * logs[test],
        }
        for name, guess in guesses.items():
            positive = np.all(y[test] > 0)
            error = np.log(np.maximum(guess, 1e-12 * y[test]) / y[test]) if positive else guess - y[test]
            rows.append(_score_row(name, cut, train, test, error))
    return rows


def ladder_ends(law: LawFit, slot: str | None = None) -> dict[str, dict]:
    """Leave-largest-size-out and leave-smallest-size-out on one axis (the first by default).

    The first is the fitness of the ladder as a forecaster, the second says whether its lowest rung is too
    small to belong. Each holds value (the rung left out), rows, rms and bias of ln yhat - ln y, or a reason
    where too few rows remain.
    """
    if law.refused:
        raise Refused("; ".join(gate.reason for gate in law.refusals))
    slot = slot or law.form.axes[0]
    if slot not in law.rows.axes:
        raise ValueError(f"form {law.form.id} has no axis {slot!r}; it has {', '.join(law.form.axes)}")
    values = law.rows.axes[slot]
    found: dict[str, dict[str, Any]] = {}
    for name, rung in (("largest", values.max()), ("smallest", values.min())):
        out = values == rung
        found[name] = {"value": float(rung), "rows": int(out.sum())}
        if (~out).sum() < len(law.form.names) + MIN_TEST or len(np.unique(values[~out])) < MIN_TEST:
            found[name] |= {"reason": "too few rows remain without it"}
            continue
        problem, solution, _ = fit_part(law, ~out)
        found[name] |= _spread(_held_out(law, problem, solution, out)[3])
    return found


def calibrated_interval(
    law: LawFit, rolling: Rolling, axes: Mapping[str, ArrayLike], ratio: float, *, beyond_range: bool = False
):
    """(prediction, low, high, note): the law's 95% band for new runs, its half-width times the conformal
    factor at this ratio.

    ratio: how far beyond the largest fitted value of the rolling axis the target lies. The note is
    "uncalibrated" where fewer than ten held-out errors exist at that ratio; the band is then the nominal one.
    """
    value, low, high = law.predict(axes, interval=True, noise=True, beyond_range=beyond_range)
    place = int(np.clip(np.searchsorted(RATIO_EDGES, ratio, side="left") - 1, 0, len(RATIO_NAMES) - 1))
    factor = rolling.widening(law.form.id)[RATIO_NAMES[place]]
    if factor is None:
        return value, low, high, "uncalibrated"
    centre, half = 0.5 * (np.log(low) + np.log(high)), 0.5 * (np.log(high) - np.log(low)) * factor
    measured = rolling.coverage
    measured = measured[
        (measured["form"] == law.form.id) & (measured["ratio"] == RATIO_NAMES[place]) & (measured["level"] == 0.95)
    ]
    share = float(measured["coverage"].iloc[0])
    note = f"coverage at {RATIO_NAMES[place]}: {share:.2f} of 0.95; widened x{factor:.2f}"
    return value, np.exp(centre - half), np.exp(centre + half), note
