"""`fit`: a run table and a form to a law with intervals, gates and a record."""

from __future__ import annotations

import warnings as python_warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd

from . import diagnostics, forms, gates, uncertainty
from . import table as run_tables
from .forms_base import Form
from .gates import EVERYTHING, INTERVALS, Gate
from .metrics import t_to_auc
from .optimum import optimum
from .record import build_record, to_json
from .solver import Problem, Solution, make_problem, solve
from .streams import solve_streams, stream_problem, v_warning
from .table import Rows

LEVEL = 0.95


class Refused(ValueError):
    """Raised when a number is asked for that a gate has refused; the message holds the reasons."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a fit besides the rows; part of the record."""

    huber_delta: float = 1e-3
    residuals: str = "auto"
    weights: str | None = None
    bootstrap: int = 1000
    seed: int = 0
    profile: bool = True
    invalid: str = "refuse"
    where: str | None = None
    auc: str = "auc"
    measured_v: float | None = None
    notes: Mapping[str, object] = field(default_factory=dict)
    form_options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class LawFit:
    """A fitted law. Refused quantities are None in `params`, `centred` and `intervals`; `refusals` says why.

    params: raw parameters; centred: coefficients as contributions at the geometric-mean axes (`centre`), read these first.
    intervals: 95% cluster-bootstrap intervals of the raw parameters and of `derived`; `centred_intervals` likewise.
    gates: every rule with its outcome. refusals: those that failed. solution: the optimiser's own result, gates or not;
    it is for computing with, not for quoting. draws[b, p]: resampled refits in search space.
    """

    form: Form
    rows: Rows
    settings: Settings
    problem: Problem | None
    solution: Solution | None
    centre: dict[str, float]
    params: dict[str, float | None]
    centred: dict[str, float | None]
    derived: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    centred_intervals: dict[str, tuple[float, float] | None]
    gates: tuple[Gate, ...]
    warnings: tuple[str, ...]
    draws: np.ndarray | None = field(default=None, repr=False)
    seed_draws: np.ndarray | None = field(default=None, repr=False)
    profiles: dict[str, uncertainty.Profile] = field(default_factory=dict, repr=False)
    jackknife: dict[str, object] = field(default_factory=dict, repr=False)
    no_floor: dict[str, float] = field(default_factory=dict, repr=False)
    slopes: dict[str, float] = field(default_factory=dict, repr=False)
    seed_noise: uncertainty.SeedNoise | None = None

    @property
    def refusals(self) -> list[Gate]:
        """Gates that failed, each with id, reason and consequence."""
        return [gate for gate in self.gates if gate.passed is False]

    @property
    def refused(self) -> bool:
        """True when nothing at all may be read from this fit."""
        return any(EVERYTHING in gate.refuses for gate in self.refusals)

    def reason(self, name: str) -> str:
        """Why a quantity is refused, or an empty string."""
        found = [f"{g.id}: {g.reason}" for g in self.refusals if EVERYTHING in g.refuses or name in g.refuses]
        return "; ".join(found)

    def _require(self) -> tuple[Problem, Solution]:
        if self.refused or self.problem is None or self.solution is None:
            reasons = "; ".join(f"{g.id}: {g.reason}" for g in self.refusals if EVERYTHING in g.refuses)
            raise Refused(f"the {self.form.id} fit is refused: {reasons}")
        return self.problem, self.solution

    def predict(
        self,
        axes: Mapping[str, Sequence[float] | np.ndarray | float] | pd.DataFrame,
        *,
        interval: bool = False,
        level: float = LEVEL,
        noise: bool = False,
        beyond_range: bool = False,
        stream: str = "logloss",
    ):
        """Predicted metric at axis values (keys: slots, their aliases or the columns fitted); arrays broadcast.

        interval: return (prediction, low, high), percentiles of the law over the resampled fits; `noise` adds resampled
        residuals, which is what a new run would show. Points beyond the `range` gate are NaN with a warning unless
        `beyond_range`. stream: "logloss" or "auc", for the joint form. Raises Refused when the fit or its intervals are refused.
        """
        problem, solution = self._require()
        wanted = self._points(axes)
        shape = np.broadcast(*wanted.values()).shape
        flat = {slot: np.broadcast_to(value, shape).ravel() for slot, value in wanted.items()}
        points = self._centred_points(flat, stream)
        beyond = np.zeros(len(points), bool) if beyond_range else gates.forecast(self.rows.axes, flat)
        if beyond.any():
            python_warnings.warn(
                f"{int(beyond.sum())} of {len(points)} predictions lie more than {gates.MAX_FORECAST_RATIO:g} times, or the "
                "fitted span again, beyond the largest fitted axis value: refused (NaN); beyond_range=True returns them",
                stacklevel=2,
            )
        on_t = self.form.target == "auc" or (self.form.streams and stream == "auc")
        outputs = [self.form.value(solution.phi, points)]
        if interval:
            outputs += list(self._band(problem, solution, points, level, noise))
        outputs = [t_to_auc(o) if on_t else o for o in outputs]
        outputs = [np.where(beyond, np.nan, o).reshape(shape)[()] for o in outputs]
        return tuple(outputs) if interval else outputs[0]

    def _points(self, axes) -> dict[str, np.ndarray]:
        """Slot -> values, from a mapping or a table."""
        given = {str(key): axes[key] for key in axes}
        found = {}
        for slot in self.form.slots:
            keys = [k for k in (slot.name, self.rows.columns[slot.name], *slot.aliases) if k in given]
            if not keys:
                raise ValueError(f"predict needs axis {slot.name} (column {self.rows.columns[slot.name]}); got {', '.join(given)}")
            found[slot.name] = np.asarray(given[keys[0]], float)
        return found

    def _centred_points(self, flat: Mapping[str, np.ndarray], stream: str) -> np.ndarray:
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
            own = (uncertainty.residuals(problem, solution.phi) * problem.unit)[slice(None) if second is None else problem.axes[:, -1] == second]
            drawn = generator.choice(own, size=curves.shape)
            curves = curves * np.exp(-drawn) if problem.kind == "log" else curves - drawn
        tail = 50 * (1 - level)
        return np.percentile(curves, tail, axis=0), np.percentile(curves, 100 - tail, axis=0)

    def optimum(self, budget: float | Sequence[float], cost: Callable | None = None, *, interval: bool = False) -> dict:
        """Cheapest way to a low metric: axis values minimising the fitted form on the level set cost(*axes) = budget.

        cost takes one array per slot and must grow in each; None is the plain product x1 * x2 * ... Returns axis -> value(s),
        "metric", "budget", and with `interval` (axis + "_interval"). Raises Refused when an exponent it rests on is refused.
        """
        self._require()
        missing = [p.name for p in self.form.parameters if p.role == "exponent" and self.params[p.name] is None]
        if missing:
            raise Refused(f"no optimum: {'; '.join(f'{name} refused ({self.reason(name)})' for name in missing)}")
        return optimum(self, budget, cost, interval)

    def solution_params(self) -> dict[str, float]:
        """Raw parameters at the optimum whatever the gates say: for computing with, never for quoting."""
        if self.solution is None:
            raise Refused(f"the {self.form.id} fit was refused before solving: {'; '.join(g.reason for g in self.refusals)}")
        raw = self.form.uncentre(self.form.to_natural(self.solution.phi), self.centre)
        return {name: float(value) for name, value in raw.items()}

    def seed_intervals(self) -> dict[str, tuple[float, float] | None]:
        """95% intervals from redrawn seed noise (empty without repeated seeds): noise of the runs, not of the choice of shapes."""
        if self.seed_draws is None or self.refused:
            return {}
        raw = self.form.uncentre(self.form.to_natural(self.seed_draws), self.centre)
        return {name: None if self.reason(name) else _percentiles(value) for name, value in raw.items()}

    @property
    def floor_upper_bound(self) -> float | None:
        """95% profile upper bound of the floor, reported where the floor itself is refused."""
        profile = self.profiles.get(self.form.floor or "")
        return None if profile is None or self.refused else profile.interval[1]

    def headline(self) -> str:
        """One line with everything an exponent needs beside it: form, metric, floor, exponents and fitted range."""
        ranges = ", ".join(f"{self.rows.columns[s]} {v.min():.3g} to {v.max():.3g}" for s, v in self.rows.axes.items() if len(v))
        if self.refused:
            return f"{self.form.id} on {self.rows.target}: refused"
        parts = [f"{p.name} = {_short(self.params[p.name])}" for p in self.form.parameters if p.role != "coefficient"]
        return f"{self.form.id} on {self.rows.target}: {', '.join(parts)}; fitted over {ranges}"

    @cached_property
    def record(self) -> dict:
        """The frozen fit record: hypothesis, runs, fit, result, validation, ranking extras, provenance, checklist."""
        return build_record(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The record as JSON; NaN and infinities become null."""
        return to_json(self.record, indent)


def fit(
    table: pd.DataFrame,
    form: str | Form = "chinchilla",
    axes: Mapping[str, str] | Sequence[str] | str | None = None,
    target: str | None = None,
    bootstrap: int = 1000,
    cluster: str | None = None,
    **options,
) -> LawFit:
    """Fit a scaling law, min over parameters of sum_i w_i Huber(ln yhat_i - ln y_i), to a table of runs.

    form: id or alias (see `forms.names()`). axes: slot -> column ({"N": "dense_params", "D": "examples"}); None takes each
    form's default columns. target: metric column; None is logloss, or loss where the table has no logloss.
    bootstrap: resampled refits for intervals, 0 for none. cluster: column whose rows are resampled together; None is shape_id.
    options: huber_delta (inf is least squares), residuals ("auto", "log", "plain"), weights (column), seed, profile,
    invalid ("refuse" or "exclude" broken rows), where (a pandas query), auc and measured_v (joint form), notes (facts for the
    record that no column holds); anything else goes to the form (base=, breaks=).

    Raises ValueError for an unknown column, form or option. Degenerate or broken tables do not raise: they return a fit
    whose `params` are None with the reasons in `refusals`.
    """
    settings, form = _resolve(table, form, axes, bootstrap, options)
    columns = run_tables.resolve_axes(form, axes)
    if target is None:
        target = "auc" if form.target == "auc" else "loss" if "logloss" not in table and "loss" in table else "logloss"
    if settings.residuals == "plain" and target in table and (pd.to_numeric(table[target], errors="coerce") <= 0).any():
        form = forms.with_real_floor(form)
    positive = settings.residuals == "log" or (settings.residuals == "auto" and form.target in ("positive", "log_target"))
    rows = run_tables.prepare(table, form, columns, target, cluster=cluster, weights=settings.weights, where=settings.where,
                         invalid=settings.invalid, positive=positive or form.streams,
                         auc=settings.auc if form.streams else None)  # fmt: skip
    return fit_rows(form, rows, settings)


_SETTINGS = ("huber_delta", "residuals", "weights", "seed", "profile", "invalid", "where", "auc", "measured_v", "notes")


def _resolve(frame, form, axes, bootstrap: int, options: dict) -> tuple[Settings, Form]:
    """Split options into fit settings and form options, and build the form."""
    own = {name: options[name] for name in _SETTINGS if name in options}
    rest = {name: value for name, value in options.items() if name not in _SETTINGS}
    named = _slot_names(frame, form, axes)
    try:
        resolved = forms.get(form, named, **rest)
    except TypeError as error:
        offered = ", ".join(_SETTINGS)
        raise ValueError(f"fit or form {form!r} has no option among {', '.join(rest)}; fit takes {offered}") from error
    if own.get("residuals", "auto") not in ("auto", "log", "plain"):
        raise ValueError(f"residuals must be auto, log or plain, found {own['residuals']!r}")
    return Settings(bootstrap=int(bootstrap), form_options=rest, **own), resolved


def _slot_names(frame, form, axes) -> tuple[str, ...] | None:
    """Slots of the forms that take any axes: those of the call, else the columns of the table that vary."""
    name = form if isinstance(form, str) else ""
    if isinstance(axes, Mapping):
        return tuple(axes)
    if axes is not None and not isinstance(axes, str):
        two_first = name in ("kappa_sum", "KSUM", "joint", "JOINT")
        return tuple(["N", "D", *axes[2:]] if two_first and len(axes) > 1 else axes)
    if axes is None and name in ("sum", "SUM", "kappa_sum", "KSUM"):
        varying = [c for c in forms.SUM_COLUMNS if c in frame and frame[c].nunique() > 1]
        return tuple(varying) if name in ("sum", "SUM") else ("N", "D", *(c for c in varying if c not in forms.SUM_COLUMNS[:2]))
    return None


def fit_rows(form: Form, rows: Rows, settings: Settings) -> LawFit:
    """`fit` after the table has been turned into arrays."""
    before = _gates_before(form, rows)
    if any(gate.passed is False and EVERYTHING in gate.refuses for gate in before):
        return _refused(form, rows, settings, before)
    problem, centre = problem_of(form, rows, settings)
    problem, solution = solve_streams(problem) if form.streams else (problem, solve(problem))
    return _assemble(form, rows, settings, before, problem, centre, solution)


def problem_of(form: Form, rows: Rows, settings: Settings) -> tuple[Problem, dict[str, float]]:
    """The solver's view of rows: centred axes, residual kind, Huber width; and the log centre per slot."""
    centre, columns = {}, []
    for slot in form.slots:
        values = rows.axes[slot.name]
        if slot.transform == "log":
            centre[slot.name] = float(np.mean(np.log(values)))
            columns.append(np.log(values) - centre[slot.name])
        else:
            centre[slot.name] = 0.0
            columns.append(values)
    kind = settings.residuals
    if kind == "auto":
        kind = "log" if form.target in ("positive", "log_target") else "plain"
    if form.streams:
        return stream_problem(form, columns, rows, settings.huber_delta), centre
    problem = make_problem(form, np.stack(columns, axis=1), rows.y, weights=rows.weights, delta=settings.huber_delta, kind=kind)
    return problem, centre


def codes_of(form: Form, rows: Rows) -> np.ndarray:
    """Cluster of every row of the problem; a run's two streams are one cluster."""
    return np.tile(rows.codes, 2) if form.streams else rows.codes


def _gates_before(form: Form, rows: Rows) -> list[Gate]:
    """Rules that need only the table."""
    found = list(rows.problems)
    if not len(rows.y):
        return found
    found += gates.degenerate(form, rows.axes, rows.y)
    distinct = len(np.unique(rows.stacked, axis=0))
    found.append(gates.dof(form, len(rows.y), len(rows.cluster_labels), distinct))
    for slot in form.slots:
        if slot.transform == "log":
            found.append(gates.span(form, slot.name, rows.axes[slot.name]))
    found += gates.collinear(form, _log_axes(form, rows), rows.columns)
    found += gates.gains(form)
    found.append(gates.clusters(len(rows.cluster_labels)))
    bracketed = rows.frame["lr_bracketed"].to_numpy(bool) if "lr_bracketed" in rows.frame else None
    found.append(gates.tuning(bracketed))
    return found


def _refused(form: Form, rows: Rows, settings: Settings, found: list[Gate]) -> LawFit:
    """A fit without numbers."""
    nothing = dict.fromkeys(form.names)
    return LawFit(form, rows, settings, None, None, {}, nothing, dict(nothing), {}, dict(nothing), dict(nothing),
                  tuple(found), rows.warnings)  # fmt: skip


def _assemble(form, rows, settings, before, problem, centre, solution) -> LawFit:
    """Run the rules that need the optimum, resample, and keep only what was not refused."""
    codes = codes_of(form, rows)
    found = [*before, gates.convergence(solution.convergence_share)]
    found += gates.bounds(form, solution.phi, problem.low, problem.high, float(np.min(np.abs(rows.y))))
    no_floor = {}
    if form.has_floor:
        evidence, rival = diagnostics.floor_evidence(problem, solution, codes)
        found.append(gates.floor(form.floor, evidence))
        bare = form.without_floor()
        raw = bare.uncentre(bare.to_natural(rival.phi), centre)
        no_floor = {**{name: float(value) for name, value in raw.items()}, "objective": rival.objective}
    enough = settings.bootstrap > 0 and len(rows.cluster_labels) >= gates.MIN_CLUSTERS
    draws = uncertainty.bootstrap(problem, solution, codes, settings.bootstrap, settings.seed) if enough else None
    if draws is not None:
        found += gates.correlation(form.names, draws)
    noise = None
    if not form.streams:
        noise = uncertainty.seed_noise(rows.frame, list(dict.fromkeys(rows.columns.values())), rows.y)
    seed_draws = None
    if noise is not None and settings.bootstrap > 0:
        seed_draws = uncertainty.seed_bootstrap(problem, solution, noise, settings.bootstrap, settings.seed + 2)
    curves = _profiles(form, problem, solution, noise, settings)
    if "kappa" in curves:
        found.append(gates.shape("kappa", curves["kappa"].interval))
    jackknife = _jackknife(form, problem, solution, rows, centre) if settings.bootstrap > 0 else {}
    notices = rows.warnings + (("seed noise unknown",) if noise is None else ())
    if form.streams:
        notices += v_warning(float(np.exp(solution.phi[form.names.index("v")])), settings.measured_v)
    result = LawFit(form, rows, settings, problem, solution, centre, {}, {}, {}, {}, {}, tuple(found), notices, draws, seed_draws, curves, jackknife,
                    no_floor, diagnostics.slopes(_log_axes(form, rows), rows.y, rows.weights), noise)  # fmt: skip
    return _with_numbers(result)


def _log_axes(form: Form, rows: Rows) -> dict[str, np.ndarray]:
    return {slot.name: rows.axes[slot.name] for slot in form.slots if slot.transform == "log"}


def _profiles(form, problem, solution, noise, settings) -> dict:
    """Profiles of exponents, floor and kappa; kappa's is needed for its gate even when nothing is resampled."""
    wanted = [p.name for p in form.parameters if p.role in ("exponent", "floor", "shape")]
    if settings.bootstrap <= 0:
        wanted = [name for name in wanted if name == "kappa"]
    return uncertainty.profiles(problem, solution, wanted, noise) if settings.profile and wanted else {}


def _jackknife(form, problem, solution, rows, centre) -> dict:
    """Leave-one-cluster-out: range of every raw parameter, and the cluster whose absence moves the fit most."""
    left = uncertainty.jackknife(problem, solution, codes_of(form, rows))
    raw = form.uncentre(form.to_natural(left), centre)
    own = form.uncentre(form.to_natural(solution.phi), centre)
    spread = np.maximum(left.std(axis=0), 1e-300)
    shift = np.abs(left - solution.phi) / spread
    worst = int(np.argmax(shift.max(axis=1)))
    return {
        "range": {name: (float(v.min()), float(v.max())) for name, v in raw.items()},
        "most_influential": rows.cluster_labels[worst],
        "shift": {name: float(raw[name][worst] - own[name]) for name in form.names},
    }


def derived_quantities(form: Form, natural: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Quantities computed from parameters: the split exponent a = beta / (alpha + beta) of two-axis forms."""
    if form.split is None:
        return {}
    alpha, beta = (np.asarray(natural[name]) for name in form.split)
    return {"a": beta / (alpha + beta)}


def _with_numbers(result: LawFit) -> LawFit:
    """Fill in parameters and intervals, leaving out whatever a gate refused."""
    form, problem, solution = result.form, result.problem, result.solution
    if result.refused:
        nothing = dict.fromkeys(form.names)
        return replace(result, params=nothing, centred=dict(nothing), intervals=dict(nothing), centred_intervals=dict(nothing))
    refused = {name for gate in result.refusals for name in gate.refuses}
    if form.split is not None and refused & set(form.split):
        refused.add("a")
    centred = form.to_natural(solution.phi)
    raw = form.uncentre(centred, result.centre)
    extra = derived_quantities(form, centred)
    params = _keep(raw, refused, float)
    ends = {"centred": {}, "raw": {}}
    if result.draws is not None:
        drawn = form.to_natural(result.draws)
        ends["centred"] = drawn
        ends["raw"] = {**form.uncentre(drawn, result.centre), **derived_quantities(form, drawn)}
    blank = dict.fromkeys([*form.names, *extra]) if result.draws is None else {}
    return replace(
        result,
        params=params,
        centred=_keep(centred, refused, float),
        derived=_keep(extra, refused, float),
        intervals=blank or _keep(ends["raw"], refused, _percentiles),
        centred_intervals=dict(blank) or _keep(ends["centred"], refused, _percentiles),
    )


def _keep(values: Mapping[str, np.ndarray], refused: set[str], convert) -> dict:
    return {name: None if name in refused else convert(value) for name, value in values.items()}


def _short(value: float | None) -> str:
    return "refused" if value is None else f"{value:.4g}"


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
