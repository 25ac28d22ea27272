"""`fit`: a run table and a form to a law with intervals, gates and a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd

from recscale.scaling.laws.fitting.law_fit import LawFit, Settings, with_numbers
from recscale.scaling.laws.fitting.problem import Prior, Problem, bounded, make_problem, residuals, with_priors
from recscale.scaling.laws.fitting.solver import Solution, solve
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.forms.power import SUM_COLUMNS
from recscale.scaling.laws.judgement import diagnostics, gates
from recscale.scaling.laws.judgement.gates import EVERYTHING, Gate
from recscale.scaling.laws.tables.axes import resolve_axes, usual_cluster, usual_target
from recscale.scaling.laws.tables.validate import Rows, prepare, require
from recscale.scaling.laws.uncertainty import bootstrap as resampling
from recscale.scaling.laws.uncertainty.curvature import groupings
from recscale.scaling.laws.uncertainty.profile import Profile, Squares, profiles
from recscale.scaling.laws.uncertainty.seed_noise import seed_noise
from recscale.scaling.laws.uncertainty.streams import solve_streams, stream_problem, v_warning


def fit(
    table: pd.DataFrame,
    form: str | Form | None = None,
    axes: Mapping[str, str] | Sequence[str] | str | None = None,
    target: str | None = None,
    bootstrap: int = Settings.bootstrap,
    cluster: str | None = None,
    **options,
) -> LawFit:
    """Fit a scaling law, min over parameters of sum_i w_i Huber(ln yhat_i - ln y_i), to a table of runs.

    form: id or alias (see `forms.names()`), or the address of a form, `package.module:attribute`; None is power_offset
    of one axis, chinchilla otherwise.
    axes: slot -> column ({"N": "dense_params", "D": "examples"}); None takes the form's default columns.
    target: metric column; None is logloss, or loss where the table has no logloss.
    bootstrap: resampled refits for intervals, 0 for none.
    cluster: column whose rows are resampled together; None is shape_id, or along examples alone the trunk or run.
    options: huber_delta (inf is least squares), residuals ("auto", "log", "plain"), weights (column), seed,
    fixed ({"E": .42}, or {"E": "@asymptote"} for a column of known floors), bounds ({"alpha": (0, 2)}), priors
    ({"alpha": ("normal", .3, .1)}, or "lognormal" with the median and the sd of the logarithm), profile, invalid
    ("refuse" or "exclude" broken rows), where (a condition on the columns), auc and measured_v (joint form), notes
    (facts for the record that no column holds); anything else goes to the form (base, breaks).

    Raises ValueError for an unknown column, form or option. Degenerate or broken tables do not raise: they
    return a fit whose `params` are None with the reasons in `refusals`.
    """
    settings, form = _resolve(table, registry.usual(axes) if form is None else form, axes, bootstrap, options)
    columns = resolve_axes(form, axes)
    if target is None:
        target = "auc" if form.target == "auc" else usual_target(table)
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
        cluster=cluster or usual_cluster(table, columns.values()),
        weights=settings.weights,
        where=settings.where,
        invalid=settings.invalid,
        positive=positive or form.streams,
        auc=settings.auc if form.streams else None,
    )
    known = _known(form, rows, settings)
    return fit_rows(form.holding(known) if known else form, rows, settings)


def _known(form: Form, rows: Rows, settings: Settings) -> dict[str, float]:
    """Fixed parameters as numbers; a floor that differs from row to row is taken off the metric, and held at 0."""
    known = {}
    for name, value in settings.fixed.items():
        if not isinstance(value, str):
            known[name] = float(value)
            continue
        if name != form.floor:
            raise ValueError(f"{name} is fixed at column {value}: only a floor can differ from row to row")
        column = _floor_of_rows(rows, value)
        known[name] = float(column[0]) if len(column) and np.ptp(column) <= 1e-12 * np.abs(column).max() else 0.0
    return known


def _floor_of_rows(rows: Rows, value: str) -> np.ndarray:
    """The column "@name" of the fitted rows. Raises ValueError unless it holds numbers below the metric."""
    require(rows.frame, value.removeprefix("@"), "a fixed floor")
    column = pd.to_numeric(rows.frame[value.removeprefix("@")], errors="coerce").to_numpy(float)
    wrong = ~(np.isfinite(column) & (column < rows.y))
    if wrong.any():
        run = rows.run_ids[int(np.argmax(wrong))]
        raise ValueError(
            f"fixed floor {value}: {int(wrong.sum())} rows have none below {rows.target}, the first is {run}"
        )
    return column


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
    if settings.priors:
        # A prior weighs against the noise of the rows, which takes a fit without it to know.
        r = residuals(problem, solution.phi)
        noise = float(np.sum(problem.weights * r**2)) / max(len(r) - len(form.names), 1)
        problem = with_priors(problem, {name: Prior(*prior) for name, prior in settings.priors.items()}, noise)
        solution = solve(problem)
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
        return bounded(stream_problem(form, columns, rows, settings.huber_delta), settings.bounds), centre
    axes, options = np.stack(columns, axis=1), {"weights": rows.weights, "delta": settings.huber_delta}
    floors = [value for value in settings.fixed.values() if isinstance(value, str)]
    if floors and np.ptp(floor := _floor_of_rows(rows, floors[0])) > 1e-12 * np.abs(floor).max():
        # Residuals stay relative to the metric itself.
        problem = make_problem(form, axes, rows.y - floor, unit=np.abs(rows.y), kind="plain", **options)
    else:
        problem = make_problem(form, axes, rows.y, kind=kind, **options)
    return bounded(problem, settings.bounds), centre


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
    if not any(gate.passed is False and EVERYTHING in gate.refuses for gate in found):
        logs = _log_axes(form, rows)
        axes = np.stack([np.log(values) for values in logs.values()], axis=1)
        target = np.log(rows.y) if np.all(rows.y > 0) else rows.y
        tested = [k for k, values in enumerate(logs.values()) if len(np.unique(values)) >= gates.MIN_DISTINCT]
        moving = {list(logs)[k]: diagnostics.trend(axes, target, rows.weights, k) for k in tested}
        found += gates.trend(form, moving)
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
    owners = [parameter.slots for parameter in form.parameters]
    groups = groupings(form.axes, owners, problem.axes, codes)
    found = [*before, gates.convergence(solution.convergence_share)]
    found += gates.bounds(form, solution.phi, problem.low, problem.high, float(np.min(np.abs(rows.y))))
    curves, squares = profiles(problem, solution, form.names, groups) if settings.profile else ({}, None)
    if squares is not None:
        found += _judged(form, solution, curves, squares)
    no_floor = {}
    if form.floor is not None:
        evidence, rival = diagnostics.floor_evidence(problem, solution)
        spare = groups[0].spare(np.eye(len(form.names))[form.floor_at])
        found.append(gates.floor(form.floor, spare, evidence, curves.get(form.floor)))
        bare = form.without_floor()
        raw = bare.uncentre(bare.to_natural(rival.phi), centre)
        no_floor = {**{name: float(value) for name, value in raw.items()}, "objective": rival.objective}
    if "kappa" in form.names:
        found.append(gates.shape("kappa", curves["kappa"].interval if "kappa" in curves else None))
    # An axis that is too short or still names all that rests on it itself: exponents of the others stand without the
    # floor that only this axis hides.
    designed = {
        name for gate in found if gate.passed is False and gate.id in ("span", "trend") for name in gate.refuses
    }
    refused = {name for gate in found if gate.passed is False for name in gate.refuses}
    found += gates.belongs(form, refused - designed, refused)
    count, seed = settings.bootstrap, settings.seed
    enough = count > 0 and len(rows.cluster_labels) >= gates.MIN_CLUSTERS
    draws = resampling.bootstrap(problem, solution, codes, count, seed) if enough else None
    noise = None if form.streams else seed_noise(rows.frame, list(dict.fromkeys(rows.columns.values())), rows.y)
    seed_draws = None
    if noise is not None and count > 0:
        seed_draws = resampling.seed_bootstrap(problem, solution, noise, count, seed + 2)
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
            spread=None if squares is None else squares.spread,
            jackknife=_jackknife(form, problem, solution, rows, centre) if count > 0 else {},
            no_floor=no_floor,
            slopes=diagnostics.slopes(_log_axes(form, rows), rows.y, rows.weights),
            seed_noise=noise,
        )
    )


def _judged(form: Form, solution: Solution, curves: Mapping[str, Profile], squares: Squares) -> list[Gate]:
    """Rules that need the least-squares fit and its profiles."""
    found = []
    exponents = [p for p in form.parameters if p.role == "exponent"]
    if exponents and not form.streams and form.target != "log_target" and not gates.gains(form):
        compared = {name: diagnostics.beaten(squares, rival) for name, rival in diagnostics.rivals(squares).items()}
        found += gates.simpler(form, compared)
        slots = [k for k, slot in enumerate(form.slots) if any(slot.name in p.slots for p in exponents)]
        found += gates.misfit(form, {form.axes[k]: diagnostics.lack_of_fit(squares, k) for k in slots})
    if not curves:
        reason = "the objective keeps falling along the profiles: the optimum was not found"
        return [*found, gates.rule("interval", None, "a minimum", reason, "no parameter is read", form.names)]
    natural = form.to_natural(solution.phi)
    for parameter in form.parameters:
        profile, value = curves[parameter.name], float(natural[parameter.name])
        found.append(gates.contained(profile, value))
        if parameter.role == "exponent" and parameter.searched == "log" and not gates.gains(form):
            found.append(gates.width(parameter.name, profile, value))
        elif parameter.name == form.floor:
            least = float(np.abs(diagnostics.excess(form, solution.phi, squares.problem.axes)).min())
            found.append(gates.width(parameter.name, profile, max(least, 1e-300), "the smallest excess above it"))
    return found


def _log_axes(form: Form, rows: Rows) -> dict[str, np.ndarray]:
    return {slot.name: rows.axes[slot.name] for slot in form.slots if slot.transform == "log"}


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
