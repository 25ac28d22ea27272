"""`fit`: a run table and a form to a law with intervals, gates and a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd

from recscale.scaling.laws.fitting.law_fit import LawFit, Settings, with_numbers
from recscale.scaling.laws.fitting.problem import Problem, make_problem
from recscale.scaling.laws.fitting.solver import Solution, solve
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.forms.power import SUM_COLUMNS
from recscale.scaling.laws.judgement import diagnostics, gates
from recscale.scaling.laws.judgement.gates import EVERYTHING, Gate
from recscale.scaling.laws.tables.axes import resolve_axes
from recscale.scaling.laws.tables.validate import Rows, prepare
from recscale.scaling.laws.uncertainty import bootstrap as resampling
from recscale.scaling.laws.uncertainty.profile import Profile, profiles
from recscale.scaling.laws.uncertainty.seed_noise import SeedNoise, seed_noise
from recscale.scaling.laws.uncertainty.streams import solve_streams, stream_problem, v_warning


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

    form: id or alias (see `forms.names()`), or the address of a form, `package.module:attribute`.
    axes: slot -> column ({"N": "dense_params", "D": "examples"}); None takes the form's default columns.
    target: metric column; None is logloss, or loss where the table has no logloss.
    bootstrap: resampled refits for intervals, 0 for none.
    cluster: column whose rows are resampled together; None is shape_id.
    options: huber_delta (inf is least squares), residuals ("auto", "log", "plain"), weights (column), seed,
    profile, invalid ("refuse" or "exclude" broken rows), where (a condition on the columns), auc and measured_v
    (joint form), notes (facts for the record that no column holds); anything else goes to the form (base, breaks).

    Raises ValueError for an unknown column, form or option. Degenerate or broken tables do not raise: they
    return a fit whose `params` are None with the reasons in `refusals`.
    """
    settings, form = _resolve(table, form, axes, bootstrap, options)
    columns = resolve_axes(form, axes)
    if target is None:
        target = "auc" if form.target == "auc" else "loss" if "logloss" not in table and "loss" in table else "logloss"
    if settings.residuals == "plain" and target in table and (pd.to_numeric(table[target], errors="coerce") <= 0).any():
        form = form.for_any_metric()
    positive = settings.residuals == "log" or (
        settings.residuals == "auto" and form.target in ("positive", "log_target")
    )
    rows = prepare(
        table,
        form,
        columns,
        target,
        cluster=cluster,
        weights=settings.weights,
        where=settings.where,
        invalid=settings.invalid,
        positive=positive or form.streams,
        auc=settings.auc if form.streams else None,
    )
    return fit_rows(form, rows, settings)


# What `fit` takes as an option besides its own parameters and those of the form.
_SETTINGS = tuple(f.name for f in fields(Settings) if f.name not in ("bootstrap", "form_options"))


def _resolve(
    frame: pd.DataFrame,
    form: str | Form,
    axes: Mapping[str, str] | Sequence[str] | str | None,
    bootstrap: int,
    options: Mapping[str, Any],
) -> tuple[Settings, Form]:
    """Split options into fit settings and form options, and build the form."""
    own = {name: options[name] for name in _SETTINGS if name in options}
    rest = {name: value for name, value in options.items() if name not in _SETTINGS}
    named = _slot_names(frame, form, axes)
    try:
        resolved = registry.get(form, named, **rest)
    except TypeError as error:
        offered = ", ".join(_SETTINGS)
        raise ValueError(f"fit or form {form!r} has no option among {', '.join(rest)}; fit takes {offered}") from error
    return Settings(bootstrap=int(bootstrap), form_options=rest, **own), resolved


def _slot_names(
    frame: pd.DataFrame, form: str | Form, axes: Mapping[str, str] | Sequence[str] | str | None
) -> tuple[str, ...] | None:
    """Slots of the forms that take any axes: those of the call, else the columns of the table that vary."""
    name = registry.full_name(form) if isinstance(form, str) else ""
    if isinstance(axes, Mapping):
        return tuple(axes)
    if axes is not None and not isinstance(axes, str):
        two_first = name in ("kappa_sum", "joint")
        return tuple(["N", "D", *axes[2:]] if two_first and len(axes) > 1 else axes)
    if axes is None and name in ("sum", "kappa_sum"):
        varying = [c for c in SUM_COLUMNS if c in frame and frame[c].nunique() > 1]
        return tuple(varying) if name == "sum" else ("N", "D", *(c for c in varying if c not in SUM_COLUMNS[:2]))
    return None


def fit_rows(form: Form, rows: Rows, settings: Settings) -> LawFit:
    """`fit` after the table has been turned into arrays."""
    before = _gates_before(form, rows)
    if any(gate.passed is False and EVERYTHING in gate.refuses for gate in before):
        return with_numbers(LawFit(form, rows, settings, tuple(before), rows.warnings))
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
    problem = make_problem(
        form, np.stack(columns, axis=1), rows.y, weights=rows.weights, delta=settings.huber_delta, kind=kind
    )
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
    with_exponent = {slot for p in form.parameters if p.role == "exponent" for slot in p.slots}
    for slot in form.slots:
        # Without an exponent on the axis a form is itself the log-linear slope that refusals point to.
        if slot.name in with_exponent:
            found.append(gates.span(form, slot.name, rows.axes[slot.name]))
    found += gates.collinear(form, _log_axes(form, rows), rows.columns)
    found += gates.gains(form)
    found.append(gates.clusters(len(rows.cluster_labels)))
    bracketed = rows.frame["lr_bracketed"].to_numpy(bool) if "lr_bracketed" in rows.frame else None
    found.append(gates.tuning(bracketed))
    return found


def _assemble(
    form: Form,
    rows: Rows,
    settings: Settings,
    before: list[Gate],
    problem: Problem,
    centre: dict[str, float],
    solution: Solution,
) -> LawFit:
    """Run the rules that need the optimum, resample, and keep only what was not refused."""
    codes = codes_of(form, rows)
    found = [*before, gates.convergence(solution.convergence_share)]
    found += gates.bounds(form, solution.phi, problem.low, problem.high, float(np.min(np.abs(rows.y))))
    no_floor = {}
    if form.floor is not None:
        evidence, rival = diagnostics.floor_evidence(problem, solution, codes)
        found.append(gates.floor(form.floor, evidence))
        bare = form.without_floor()
        raw = bare.uncentre(bare.to_natural(rival.phi), centre)
        no_floor = {**{name: float(value) for name, value in raw.items()}, "objective": rival.objective}
    count, seed = settings.bootstrap, settings.seed
    enough = count > 0 and len(rows.cluster_labels) >= gates.MIN_CLUSTERS
    draws = resampling.bootstrap(problem, solution, codes, count, seed) if enough else None
    if draws is not None:
        found += gates.correlation(form.names, draws)
    noise = None if form.streams else seed_noise(rows.frame, list(dict.fromkeys(rows.columns.values())), rows.y)
    seed_draws = None
    if noise is not None and count > 0:
        seed_draws = resampling.seed_bootstrap(problem, solution, noise, count, seed + 2)
    curves = _profiles(form, problem, solution, noise, settings)
    if "kappa" in form.names:
        found.append(gates.shape("kappa", curves["kappa"].interval if "kappa" in curves else None))
    notices = rows.warnings + (("seed noise unknown",) if noise is None else ())
    if form.streams:
        notices += v_warning(float(np.exp(solution.phi[form.names.index("v")])), settings.measured_v)
    return with_numbers(
        LawFit(
            form,
            rows,
            settings,
            tuple(found),
            notices,
            problem,
            solution,
            centre,
            draws=draws,
            seed_draws=seed_draws,
            profiles=curves,
            jackknife=_jackknife(form, problem, solution, rows, centre) if count > 0 else {},
            no_floor=no_floor,
            slopes=diagnostics.slopes(_log_axes(form, rows), rows.y, rows.weights),
            seed_noise=noise,
        )
    )


def _log_axes(form: Form, rows: Rows) -> dict[str, np.ndarray]:
    return {slot.name: rows.axes[slot.name] for slot in form.slots if slot.transform == "log"}


def _profiles(
    form: Form, problem: Problem, solution: Solution, noise: SeedNoise | None, settings: Settings
) -> dict[str, Profile]:
    """Profiles of exponents, floor and kappa; kappa's gate needs its own even when nothing is resampled."""
    wanted = [p.name for p in form.parameters if p.role in ("exponent", "floor", "shape")]
    if settings.bootstrap <= 0:
        wanted = [name for name in wanted if name == "kappa"]
    return profiles(problem, solution, wanted, noise) if settings.profile and wanted else {}


def _jackknife(
    form: Form, problem: Problem, solution: Solution, rows: Rows, centre: Mapping[str, float]
) -> dict[str, Any]:
    """Leave-one-cluster-out: range of every raw parameter, and the cluster that moves the fit most."""
    left = resampling.jackknife(problem, solution, codes_of(form, rows))
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
