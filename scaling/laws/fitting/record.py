"""The fit record: everything a reader needs to believe or repeat a fit, as plain data.

Sections: hypothesis, runs, fit, result, validation, ranking, provenance, and a checklist that says which
required facts are present. Facts no fit can know (how shape was chosen, what the size counts) come from the
run table's columns or from the `notes` of the call; what neither holds is listed as missing, and a plot of
such a record carries the word incomplete.
"""

from __future__ import annotations

import hashlib

import jax
import numpy as np
import pandas as pd

from recscale.scaling.laws.judgement import gates
from recscale.scaling.records import provenance
from recscale.scaling.records.plain import plain

from .law_fit import LawFit
from .problem import residual_scale, residuals
from .solver import MAX_ITERATIONS, VERSION, Control

# Facts a record needs besides what the fit computes.
_REPORTED = {
    "hypothesis": ("size_counts", "data_counts", "flop_convention"),
    "runs": (
        "shape_choice", "data_order", "batch", "optimizer", "lr_rule", "lr_trials", "warmup", "schedule", "decayed",
        "seeds", "smoothing", "checkpoints_used",
    ),
    "ranking": (
        "metric_window_rows", "base_rate", "calibration", "time_split", "epochs", "negative_sampling", "table_sizes",
        "table_start", "hash_collision_share", "history_length",
    ),
}  # fmt: skip
# Run-table columns that may hold a fact, where they are not called as it is.
_COLUMNS = {
    "data_order": ("data_order", "data_seed"),
    "batch": ("batch_rows",),
    "warmup": ("warmup_examples",),
    "seeds": ("seed",),
    "table_sizes": ("embedding_params",),
}
_LISTED_VALUES = 8


def record(law: LawFit, validation: dict | None = None) -> dict:
    """The record of a fit as nested plain dictionaries; `validation` holds rolling-origin results where there
    are any.
    """
    sections = {
        "hypothesis": _hypothesis(law),
        "runs": _runs(law),
        "fit": _fit(law),
        "result": _result(law),
        "validation": validation or {},
        "ranking": {},
        "provenance": _provenance(law),
    }
    missing = []
    for section, facts in _REPORTED.items():
        for name in facts:
            value = _fact(law, name)
            sections[section][name] = value
            if value is None:
                missing.append(f"{section}.{name}")
    if not sections["validation"]:
        missing.append("validation")
    return plain({**sections, "checklist": {"complete": not missing, "missing": missing}})


def _fact(law: LawFit, name: str):
    """A reported fact from the call's notes, else a summary of the column that holds it, else None."""
    if name in law.settings.notes:
        return law.settings.notes[name]
    for column in _COLUMNS.get(name, (name,)):
        if column in law.rows.frame.columns:
            values = law.rows.frame[column].dropna()
            if len(values):
                return summarise(values)
    return None


def summarise(values: pd.Series):
    """A column in a few words: its distinct values when few, else range and median of numbers."""
    distinct = pd.unique(values.map(str) if values.dtype == object else values)
    if len(distinct) <= _LISTED_VALUES:
        return sorted(distinct.tolist(), key=str)
    if pd.api.types.is_numeric_dtype(values):
        return {
            "min": float(values.min()),
            "median": float(values.median()),
            "max": float(values.max()),
            "distinct": len(distinct),
        }
    return {"distinct": len(distinct)}


def _hypothesis(law: LawFit) -> dict:
    form = law.form
    return {
        "form": form.id,
        "equation": form.equation,
        "source": form.source,
        "axes": dict(law.rows.columns),
        "metric": law.rows.target,
        "shared_exponents": form.id.endswith("_tied"),
        "valid": form.valid,
        "limits": form.limits,
        "claimed_range": law.settings.notes.get("claimed_range", claimed_range(law)),
        "options": dict(law.settings.form_options),
    }


def claimed_range(law: LawFit) -> dict:
    """Slot -> (smallest, largest) value a forecast is not refused at."""
    found = {}
    for slot, values in law.rows.axes.items():
        if len(values):
            low, high = float(values.min()), float(values.max())
            found[slot] = (low, high * min(gates.MAX_FORECAST_RATIO, high / low) if low > 0 else high)
    return found


def _runs(law: LawFit) -> dict:
    rows = law.rows
    reasons = pd.Series([e.reason for e in rows.exclusions], dtype=object)
    status = rows.frame["status"] if "status" in rows.frame else None
    return {
        "run_ids": list(rows.run_ids),
        "rows": len(rows.y),
        "clusters": len(rows.cluster_labels),
        "cluster_column": rows.cluster,
        "cluster_of_row": [rows.cluster_labels[code] for code in rows.codes],
        "axes": {slot: values for slot, values in rows.axes.items()},
        "metric_values": rows.y,
        "status": None if status is None else status.value_counts().to_dict(),
        "excluded": [{"row": e.row, "run_id": e.run_id, "reason": e.reason} for e in rows.exclusions],
        "excluded_counts": reasons.value_counts().to_dict(),
        "diverged": int(sum("diverged" in reason for reason in reasons)),
        "failed": int(sum("failed" in reason for reason in reasons)),
    }


def _fit(law: LawFit) -> dict:
    settings, problem, solution = law.settings, law.problem, law.solution
    found = {
        "objective": "sum of weight * Huber(residual), never averaged",
        "residual": None if problem is None else "ln yhat - ln y" if problem.kind == "log" else "(yhat - y) / unit",
        "transform": "t = 2 Phi^-1(AUC)^2" if law.form.target == "auc" else "none",
        "huber_delta": settings.huber_delta if np.isfinite(settings.huber_delta) else "inf (least squares)",
        "weights": settings.weights or "one per row",
        "parameters_searched": {p.name: p.searched for p in law.form.parameters},
        "centre": {slot: float(np.exp(value)) for slot, value in law.centre.items()},
        "solver": f"recscale law solver {VERSION}",
        "gradient": "forward-mode Jacobian, float64",
        "tolerance": Control().tolerance,
        "max_iterations": MAX_ITERATIONS,
        "jax": jax.__version__,
    }
    if problem is not None and solution is not None:
        r = residuals(problem, solution.phi)
        scale = residual_scale(r)
        found |= {
            "value": solution.objective,
            "delta_over_sigma": settings.huber_delta / scale if scale > 0 else None,
            "residual_scale": scale,
            "residual_rms": float(np.sqrt(np.mean(r**2))),
            "residual_sd": float(np.std(r)),
            "information_criteria": information_criteria(r, len(law.form.names)),
            "starts": len(solution.starts.phi),
            "convergence_share": solution.convergence_share,
            "iterations": solution.iterations,
            "gradient_norm": solution.gradient,
            "bounds": {
                p.name: (low, high) for p, low, high in zip(law.form.parameters, problem.low, problem.high, strict=True)
            },
        }
    return found


def information_criteria(residuals: np.ndarray, parameters: int) -> dict[str, float | None]:
    """AICc and BIC of Gaussian residuals[n]: shown beside a fit, never used to choose between forms."""
    n, p = len(residuals), parameters + 1  # the noise scale is a parameter too
    mean_square = float(np.mean(residuals**2))
    if mean_square <= 0 or n - p - 1 <= 0:
        return {"aicc": None, "bic": None}
    deviance = n * np.log(mean_square)
    return {"aicc": deviance + 2 * p * n / (n - p - 1), "bic": deviance + p * np.log(n)}


def _result(law: LawFit) -> dict:
    found = {
        "params": law.params,
        "centred": law.centred,
        "derived": law.derived,
        "units": law.form.units,
        "intervals": law.intervals,
        "centred_intervals": law.centred_intervals,
        "ranges": law.ranges,
        "given": law.given,
        "data_alone": [name for name in law.form.names if name not in law.given],
        "bootstrap_intervals": law.bootstrap_intervals(),
        "seed_noise_intervals": law.seed_intervals(),
        "seed_noise": None if law.seed_noise is None else vars(law.seed_noise),
        "floor_upper_bound": law.floor_upper_bound,
        "jackknife": _granted_jackknife(law),
        "no_floor_fit": _no_floor(law),
        "log_linear_slopes": law.slopes,
        "gates": [gate.as_dict() for gate in law.gates],
        "refusals": [gate.as_dict() for gate in law.refusals],
        "warnings": list(law.warnings),
        "bootstrap": {
            "draws": 0 if law.draws is None else len(law.draws),
            "seed": law.settings.seed,
            "level": 0.95,
        },
    }
    if law.draws is not None and len(law.form.names) > 1:
        spread = law.draws.std(axis=0)
        if np.all(spread > 1e-12):
            found["correlation"] = {"names": list(law.form.names), "matrix": np.corrcoef(law.draws.T)}
    if law.problem is not None and law.solution is not None:
        found["residuals"] = residuals(law.problem, law.solution.phi)
    return found


def _no_floor(law: LawFit) -> dict[str, float]:
    """The fit with the floor at 0, unless the rows obey no law in the first place, with a floor or without."""
    exponents = {p.name for p in law.form.parameters if p.role == "exponent"}
    none = any(exponents & set(gate.refuses) for gate in law.refusals if gate.id in ("form", "trend", "span"))
    return {} if law.refused or none else law.no_floor


def _granted_jackknife(law: LawFit) -> dict:
    """Leave-one-cluster-out results without those of refused parameters."""
    return {
        name: {key: value for key, value in found.items() if not law.reason(key)} if isinstance(found, dict) else found
        for name, found in law.jackknife.items()
    }


def table_hash(frame: pd.DataFrame) -> str:
    """SHA-256 over the rows and column names of a table, as text, so it survives a change of file format."""
    digest = hashlib.sha256("\x1f".join(map(str, frame.columns)).encode())
    for row in frame.itertuples(index=False):
        digest.update("\x1f".join(map(repr, row)).encode())
    return digest.hexdigest()


def _provenance(law: LawFit) -> dict:
    return {
        "commit": provenance.commit(),
        "table_sha256": table_hash(law.rows.frame),
        "date": provenance.now(),
        "command": provenance.command(),
        "settings": {name: value for name, value in vars(law.settings).items() if name != "notes"},
        "versions": provenance.versions(("jax", "numpy", "pandas")),
    }
