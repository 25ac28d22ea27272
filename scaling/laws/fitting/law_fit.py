"""What a fit returns: `LawFit`, its settings, and how refused quantities are left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special

from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.forms.metric_maps import t_to_auc
from recscale.scaling.laws.judgement import gates
from recscale.scaling.laws.judgement.gates import EVERYTHING, INTERVALS, Gate
from recscale.scaling.laws.tables.validate import Rows
from recscale.scaling.laws.uncertainty.curvature import Spread
from recscale.scaling.laws.uncertainty.profile import Profile
from recscale.scaling.laws.uncertainty.seed_noise import SeedNoise

from .problem import Problem, residuals
from .solver import Solution

LEVEL = 0.95


class Refused(ValueError):
    """Raised when a number is asked for that a gate has refused; the message holds the reasons."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a fit besides the rows; part of the record."""

    huber_delta: float = 1e-3
    residuals: Literal["auto", "log", "plain"] = "auto"
    weights: str | None = None
    bootstrap: int = 1000
    seed: int = 0
    profile: bool = True
    invalid: Literal["refuse", "exclude"] = "refuse"
    where: str | None = None
    auc: str = "auc"
    measured_v: float | None = None
    notes: Mapping[str, object] = field(default_factory=dict)
    form_options: Mapping[str, object] = field(default_factory=dict)
    fixed: Mapping[str, float | str] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    priors: Mapping[str, tuple[str, float, float]] = field(default_factory=dict)

    def __post_init__(self):
        for name in self.fixed:
            if name in self.bounds or name in self.priors:
                raise ValueError(f"{name} is fixed: a bound or a prior on it says nothing")
        if self.residuals not in ("auto", "log", "plain"):
            raise ValueError(f"residuals must be auto, log or plain, found {self.residuals!r}")
        if self.bootstrap < 0:
            raise ValueError(f"bootstrap is {self.bootstrap}, expected a number of refits, or 0 for none")
        if not self.huber_delta > 0:
            raise ValueError(f"huber_delta is {self.huber_delta}, expected a positive width (inf is least squares)")


@dataclass(frozen=True)
class LawFit:
    """A fitted law. Refused quantities are None in `params`, `centred` and `intervals`; `refusals` says why.

    params: raw parameters. centred: the same with coefficients as contributions at the geometric-mean axes
    (`centre` holds the logs of those); read these first.
    intervals: 95% profile intervals of the parameters and of `derived`, clusters as the unit of noise; None for raw
    coefficients, which carry the error of their exponents: `centred_intervals` has those at the centre.
    ranges: intervals of parameters that are refused only because they belong to a refused one: where they lie
    whatever value that one takes.
    gates: every rule with its outcome; refusals: those that failed.
    solution: the optimiser's own result, gates or not, for computing with and never for quoting.
    draws[b, p]: resampled refits in search space.
    """

    form: Form
    rows: Rows
    settings: Settings
    gates: tuple[Gate, ...]
    warnings: tuple[str, ...]
    problem: Problem | None = None
    solution: Solution | None = None
    centre: dict[str, float] = field(default_factory=dict)
    params: dict[str, float | None] = field(default_factory=dict)
    centred: dict[str, float | None] = field(default_factory=dict)
    derived: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    centred_intervals: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    spread: Spread | None = field(default=None, repr=False)
    draws: np.ndarray | None = field(default=None, repr=False)
    seed_draws: np.ndarray | None = field(default=None, repr=False)
    profiles: dict[str, Profile] = field(default_factory=dict, repr=False)
    jackknife: dict[str, Any] = field(default_factory=dict, repr=False)
    no_floor: dict[str, float] = field(default_factory=dict, repr=False)
    slopes: dict[str, float] = field(default_factory=dict, repr=False)
    seed_noise: SeedNoise | None = None

    @property
    def given(self) -> dict[str, str]:
        """Parameter -> what the caller knew of it: a value, bounds, a prior. All others are the data's alone."""
        settings = self.settings
        told = {name: f"fixed at {value}" for name, value in settings.fixed.items()}
        for name, (low, high) in settings.bounds.items():
            told[name] = f"between {low:g} and {high:g}"
        for name, (kind, mean, sd) in settings.priors.items():
            told[name] = ", ".join(part for part in (told.get(name), f"{kind} prior {mean:g}, sd {sd:g}") if part)
        return told

    @property
    def refusals(self) -> list[Gate]:
        """Gates that failed, each with id, reason and consequence."""
        return [gate for gate in self.gates if gate.passed is False]

    @property
    def refused(self) -> bool:
        """True when nothing at all may be read from this fit."""
        return any(EVERYTHING in gate.refuses for gate in self.refusals)

    @property
    def granted(self) -> bool:
        """True when some parameter, or quantity derived from them, may be read."""
        return any(value is not None for value in (*self.params.values(), *self.derived.values()))

    def reason(self, name: str) -> str:
        """Why a quantity is refused, or an empty string."""
        found = [f"{g.id}: {g.reason}" for g in self.refusals if EVERYTHING in g.refuses or name in g.refuses]
        return "; ".join(found)

    def solved(self) -> tuple[Problem, Solution]:
        """The solver's problem and its best fit. Raises Refused when nothing may be read from the fit."""
        if self.refused or self.problem is None or self.solution is None:
            reasons = "; ".join(f"{g.id}: {g.reason}" for g in self.refusals if EVERYTHING in g.refuses)
            raise Refused(f"the {self.form.id} fit is refused: {reasons}")
        return self.problem, self.solution

    def predict(
        self,
        axes: Mapping[str, ArrayLike] | pd.DataFrame,
        *,
        interval: bool = False,
        level: float = LEVEL,
        noise: bool = False,
        beyond_range: bool = False,
        stream: Literal["logloss", "auc"] = "logloss",
    ) -> Any:
        """Predicted metric at axis values (keys: slots, their aliases or the columns fitted); arrays
        broadcast.

        interval: return (prediction, low, high), percentiles of the law over the resampled fits; `noise` adds
        resampled residuals, which is what a new run would show. Points beyond the `range` gate are NaN with a
        warning unless `beyond_range`. stream: "logloss" or "auc", for the joint form. Raises Refused when the
        fit or its intervals are refused.
        """
        problem, solution = self.solved()
        wanted = self._points(axes)
        shape = np.broadcast(*wanted.values()).shape
        flat = {slot: np.broadcast_to(value, shape).ravel() for slot, value in wanted.items()}
        points = self._centred_points(flat, stream)
        beyond = np.zeros(len(points), bool) if beyond_range else gates.forecast(self.rows.axes, flat)
        if beyond.any():
            warnings.warn(
                f"{int(beyond.sum())} of {len(points)} predictions lie more than "
                f"{gates.MAX_FORECAST_RATIO:g} times, or the fitted span again, beyond the largest fitted "
                "axis value: refused (NaN); beyond_range=True returns them",
                stacklevel=2,
            )
        on_t = self.form.target == "auc" or (self.form.streams and stream == "auc")
        outputs = [self.form.value(solution.phi, points)]
        if interval:
            outputs += list(self._band(problem, solution, points, level, noise))
        outputs = [t_to_auc(o) if on_t else o for o in outputs]
        outputs = [np.where(beyond, np.nan, o).reshape(shape)[()] for o in outputs]
        return tuple(outputs) if interval else outputs[0]

    def _points(self, axes: Mapping[str, ArrayLike] | pd.DataFrame) -> dict[str, np.ndarray]:
        """Slot -> values, from a mapping or a table."""
        given: dict[str, Any] = {str(key): values for key, values in axes.items()}
        found = {}
        for slot in self.form.slots:
            keys = [k for k in (slot.name, self.rows.columns[slot.name], *slot.aliases) if k in given]
            if not keys:
                raise ValueError(
                    f"predict needs axis {slot.name} (column {self.rows.columns[slot.name]}); got {', '.join(given)}"
                )
            found[slot.name] = np.asarray(given[keys[0]], float)
        return found

    def _centred_points(self, flat: Mapping[str, np.ndarray], stream: Literal["logloss", "auc"]) -> np.ndarray:
        """Centred axes [m, d] of raw values, with the stream marker where the form has one."""
        columns = [
            np.log(flat[slot.name]) - self.centre[slot.name] if slot.transform == "log" else flat[slot.name]
            for slot in self.form.slots
        ]
        if self.form.streams:
            if stream not in ("logloss", "auc"):
                raise ValueError(f"stream must be 'logloss' or 'auc', found {stream!r}")
            columns.append(np.full(len(columns[0]), float(stream == "auc")))
        return np.stack(columns, axis=1)

    def _band(self, problem: Problem, solution: Solution, points: np.ndarray, level: float, noise: bool):
        """(low, high) percentiles of predictions over the resampled fits."""
        if self.draws is None:
            raise Refused(f"no interval: {self.reason(INTERVALS) or 'the fit was made with bootstrap=0'}")
        curves = np.stack([self.form.value(phi, points) for phi in self.draws])
        if noise:
            generator = np.random.default_rng(self.settings.seed + 1)
            second = points[0, -1] if self.form.streams else None
            own = (residuals(problem, solution.phi) * problem.unit)[
                slice(None) if second is None else problem.axes[:, -1] == second
            ]
            drawn = generator.choice(own, size=curves.shape)
            curves = curves * np.exp(-drawn) if problem.kind == "log" else curves - drawn
        tail = 50 * (1 - level)
        return np.percentile(curves, tail, axis=0), np.percentile(curves, 100 - tail, axis=0)

    def solution_params(self) -> dict[str, float]:
        """Raw parameters at the optimum whatever the gates say: for computing with, never for quoting."""
        if self.solution is None:
            raise Refused(
                f"the {self.form.id} fit was refused before solving: {'; '.join(g.reason for g in self.refusals)}"
            )
        raw = self.form.uncentre(self.form.to_natural(self.solution.phi), self.centre)
        return {name: float(value) for name, value in raw.items()}

    def seed_intervals(self) -> dict[str, tuple[float, float] | None]:
        """95% intervals from redrawn seed noise (empty without repeated seeds): noise of the runs, not of the
        choice of shapes.
        """
        return self._percentiles_of(self.seed_draws)

    def bootstrap_intervals(self) -> dict[str, tuple[float, float] | None]:
        """95% percentile intervals of resampled clusters (empty without them), for the record: with few clusters they
        are too narrow.
        """
        return self._percentiles_of(self.draws)

    def _percentiles_of(self, draws: np.ndarray | None) -> dict[str, tuple[float, float] | None]:
        if draws is None or self.refused:
            return {}
        raw = self.form.uncentre(self.form.to_natural(draws), self.centre)
        return {name: None if self.reason(name) else _percentiles(value) for name, value in raw.items()}

    @property
    def floor_upper_bound(self) -> float | None:
        """95% profile upper bound of the floor, reported where the floor itself is refused."""
        profile = self.profiles.get(self.form.floor or "")
        return None if profile is None or self.refused else profile.interval[1]

    def headline(self) -> str:
        """One line with everything an exponent needs beside it: form, metric, floor, exponents and fitted
        range.
        """
        ranges = ", ".join(
            f"{self.rows.columns[s]} {v.min():.3g} to {v.max():.3g}" for s, v in self.rows.axes.items() if len(v)
        )
        if self.refused:
            return f"{self.form.id} on {self.rows.target}: refused"
        parts = [f"{p.name} = {_short(self.params[p.name])}" for p in self.form.parameters if p.role != "coefficient"]
        return f"{self.form.id} on {self.rows.target}: {', '.join(parts)}; fitted over {ranges}"


def derived_quantities(form: Form, natural: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Quantities computed from parameters: the split exponent a = beta / (alpha + beta) of two-axis forms."""
    if form.split is None:
        return {}
    alpha, beta = (np.asarray(natural[name]) for name in form.split)
    return {"a": beta / (alpha + beta)}


def with_numbers(result: LawFit) -> LawFit:
    """Fill in parameters and intervals, leaving out whatever a gate refused."""
    form, solution = result.form, result.solution
    if result.refused or solution is None:
        fields = ("params", "centred", "intervals", "centred_intervals")
        return replace(result, **{name: dict.fromkeys(form.names) for name in fields})
    refused = {name for gate in result.refusals for name in gate.refuses}
    if form.split is not None and refused & set(form.split):
        refused.add("a")
    centred = form.to_natural(solution.phi)
    derived = derived_quantities(form, centred)
    centred_intervals = {name: _interval(result, name, refused, centred) for name in form.names}
    raw_coefficients = {p.name for p in form.parameters if p.powers or p.role in ("location", "level")}
    intervals = {
        **{name: None if name in raw_coefficients else ends for name, ends in centred_intervals.items()},
        **{name: None if name in refused else _split_interval(result) for name in derived},
    }
    only_belongs = refused - {name for gate in result.refusals if gate.id != "belongs" for name in gate.refuses}
    return replace(
        result,
        params=_keep(form.uncentre(centred, result.centre), refused, float),
        centred=_keep(centred, refused, float),
        derived=_keep(derived, refused, float),
        intervals=intervals,
        centred_intervals=centred_intervals,
        ranges={
            name: result.profiles[name].interval
            for name in form.names
            if name in only_belongs - raw_coefficients and name in result.profiles and result.profiles[name].closed
        },
    )


def _interval(
    result: LawFit, name: str, refused: set[str], centred: Mapping[str, np.ndarray]
) -> tuple[float, float] | None:
    """The profile interval of a parameter that is not refused; ends that agree with it up to rounding hold it."""
    if name in refused or name not in result.profiles or result.reason(INTERVALS):
        return None
    low, high = result.profiles[name].interval
    return min(low, float(centred[name])), max(high, float(centred[name]))


def _split_interval(result: LawFit) -> tuple[float, float] | None:
    """The interval of a = beta / (alpha + beta), symmetric in ln(beta / alpha)."""
    form, solution = result.form, result.solution
    if result.spread is None or solution is None or form.split is None or result.reason(INTERVALS):
        return None
    alpha, beta = (form.names.index(name) for name in form.split)
    contrast = np.zeros(len(form.names))
    contrast[alpha] -= 1.0
    contrast[beta] += 1.0
    reach = np.sqrt(result.spread.squared_reach(contrast))
    middle = solution.phi[beta] - solution.phi[alpha]
    return float(special.expit(middle - reach)), float(special.expit(middle + reach))


def _keep(values: Mapping[str, np.ndarray], refused: set[str], convert: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    return {name: None if name in refused else convert(value) for name, value in values.items()}


def _short(value: float | None) -> str:
    return "refused" if value is None else f"{value:.4g}"


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
