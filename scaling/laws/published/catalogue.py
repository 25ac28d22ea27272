"""Scaling laws printed by others, as data: y = E + A x^-alpha and its relatives with the papers' own
constants.

The records live in `published/*.json` beside this file (provenance in `published/README.md`). A published
number carries a grade saying how it was obtained, and the grade decides what may be done with it:

- a law without constants cannot be evaluated or drawn (`CannotPlot`);
- grades `secondary`, `abstract`, `unverified` are drawn dashed, with the grade in the legend;
- a curve may be drawn over a fitted law only if axis, metric and convention agree (`OverlayRefused` lists
  what does not);
- the exponent of a metric *gain* (form GAIN) is never compared with anything: it depends on the baseline and
  the range of x, and for y = x^-alpha it falls when alpha rises.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recscale.pallas_kernels import names

_FOLDER = Path(__file__).parent
_DASHED_GRADES = frozenset({"secondary", "abstract", "unverified"})
RESULT_SETS = ("mixers", "sequence", "memory", "domains", "quality")


class CannotPlot(ValueError):
    """A published law that has no curve: no constants, or a form that is stored for reference only."""


class OverlayRefused(ValueError):
    """A published curve and a fitted law that do not show the same thing; `.mismatches` lists how."""

    def __init__(self, law_id: str, mismatches: list[str]):
        self.law_id, self.mismatches = law_id, mismatches
        super().__init__(f"published law {law_id!r} cannot be drawn over this fit: " + "; ".join(mismatches))


@dataclass(frozen=True)
class PublishedLaw:
    """One printed law; axes, axis_units, conventions are parallel, range is None where none is printed."""

    id: str
    paper: str
    arxiv: str | None
    venue: str | None
    domain: str | None
    form: str
    equation: str | None
    parameters: Mapping[str, Any]
    axes: tuple[str, ...]
    axis_units: tuple[str | None, ...]
    conventions: tuple[str | None, ...]
    range: tuple[tuple[float, float], ...] | None
    n_points: int | None
    metrics: tuple[str, ...]
    metric_ids: tuple[str, ...]
    held_fixed: str | None
    grade: str
    grade_detail: str | None
    caution: str | None
    printed_as: str | None

    @property
    def linestyle(self) -> str:
        """Matplotlib line style: '--' for grades that must be verified before quoting, '-' otherwise."""
        return "--" if self.grade in _DASHED_GRADES else "-"

    @property
    def label(self) -> str:
        """Legend text: short title and arXiv id, with the grade where the number is not from the paper
        itself.
        """
        source = f"{self.paper.split(':')[0]} (arXiv {self.arxiv})" if self.arxiv else self.paper
        return f"{source} [{self.grade}]" if self.grade in _DASHED_GRADES else source


@dataclass(frozen=True)
class PublishedCurve:
    """A published law as a function of its axes in the paper's own units: float64, broadcasting."""

    law: PublishedLaw
    _evaluate: Callable[..., np.ndarray]

    def __call__(self, *x: float | np.ndarray) -> np.ndarray:
        """y at x. Raises ValueError if the number of arguments is not the number of axes, or a value is not
        positive.
        """
        if len(x) != len(self.law.axes):
            raise ValueError(
                f"{self.law.id!r} has axes {list(self.law.axes)}: expected {len(self.law.axes)} arguments, got {len(x)}"
            )
        arrays = [np.asarray(value, dtype=np.float64) for value in x]
        for name, value in zip(self.law.axes, arrays, strict=True):
            if not np.all(value > 0):
                raise ValueError(f"{self.law.id!r}: axis {name!r} must be positive, found {np.min(value)}")
        return self._evaluate(*arrays)

    def inside(self, *x: float | np.ndarray) -> np.ndarray:
        """Whether x lies in the range the law was read on; raises ValueError where the paper states none."""
        if self.law.range is None:
            raise ValueError(f"{self.law.id!r}: the source states no numeric range")
        result = np.asarray(True)
        for value, (low, high) in zip(x, self.law.range, strict=True):
            value = np.asarray(value, dtype=np.float64)
            result = result & (value >= low) & (value <= high)
        return result


def load(law_id: str) -> PublishedLaw:
    """The law stored under `law_id` in `published/laws.json`. Raises KeyError naming the closest ids."""
    return _law(_record("laws", law_id))


def ids() -> list[str]:
    """Ids of all published laws, in the order of the file."""
    return [record["id"] for record in _read("laws")["laws"]]


def curve(law_id: str) -> PublishedCurve:
    """The law as a function of its axes, y = form(x; printed constants).

    Raises CannotPlot if the constants are not printed (or not verified), or the form has no curve.
    """
    law = load(law_id)
    rule = _CURVES.get(law.form)
    if rule is None:
        raise CannotPlot(
            f"{law_id!r}: form {law.form!r} is stored for reference and has no curve; forms with one: {sorted(_CURVES)}"
        )
    needed, evaluate = rule
    constants = _constants(law)
    missing = [name for name in needed if name not in constants]
    if missing:
        found = sorted(law.parameters) or "none"
        raise CannotPlot(
            f"{law_id!r}: form {law.form!r} needs {list(needed)}, the source prints {found}; missing {missing}"
        )
    if law.printed_as == "percent_change":
        return PublishedCurve(law, lambda *x: evaluate(constants, *x) - 100.0)
    return PublishedCurve(law, functools.partial(evaluate, constants))


def points(points_id: str) -> pd.DataFrame:
    """Printed or digitised points as a table; `.attrs` holds paper, arxiv, architecture, origin, note. Raises
    KeyError.
    """
    record = _record("points", points_id)
    frame = pd.DataFrame(record["rows"], columns=record["columns"], dtype=np.float64)
    frame.attrs.update({key: value for key, value in record.items() if key not in ("rows", "columns")})
    return frame


def reference_fit(fit_id: str) -> dict[str, Any]:
    """One record of `reference_fits` (fits of public tables, used as anchors). Raises KeyError."""
    return dict(_record("reference_fits", fit_id))


def significance_thresholds() -> pd.DataFrame:
    """The differences that authors call significant: columns source, threshold, grade."""
    return pd.DataFrame(_read("laws")["significance_thresholds"])


def results(name: str, **equals: Any) -> pd.DataFrame:
    """Published result cells of one collection (`RESULT_SETS`), one row each, filtered by column equality.

    Example: `results("mixers", paper="RankMixer", metric="finish_auc")`. Raises KeyError for an unknown
    collection or column.
    """
    if name not in RESULT_SETS:
        raise KeyError(f"no published collection {name!r}; available: {list(RESULT_SETS)}")
    frame = pd.DataFrame(_read(name))
    for column, value in equals.items():
        if column not in frame.columns:
            raise KeyError(f"collection {name!r} has no column {column!r}; columns: {list(frame.columns)}")
        frame = frame[frame[column] == value]
    return frame.reset_index(drop=True)


def overlay(
    law_id: str,
    *,
    axes: str | list[str],
    metric: str,
    convention: str | list[str] | None,
) -> PublishedCurve:
    """The published curve, if it shows the same quantity as a fit with these axes, metric and convention.

    `axes` are run-table columns, `metric` a `metric_id`, `convention` what one unit of each axis counts (such
    as "gflop_per_example" or "params"). Raises OverlayRefused listing every mismatch, CannotPlot for a law
    without constants.
    """
    law = load(law_id)
    axes = [axes] if isinstance(axes, str) else list(axes)
    conventions = [convention] * len(axes) if convention is None or isinstance(convention, str) else list(convention)
    mismatches = []
    if law.form == "GAIN":
        mismatches.append("form GAIN: its exponent moves with baseline and range and is never compared")
    if list(law.axes) != axes:
        mismatches.append(f"axis: published {list(law.axes)}, fitted {axes}")
    if metric not in law.metric_ids:
        mismatches.append(f"metric: published {list(law.metric_ids)}, fitted {metric!r}")
    if None in law.conventions:
        mismatches.append("convention: the source does not state what its axis counts")
    elif list(law.conventions) != conventions:
        stated = conventions if None not in conventions else "not stated"
        mismatches.append(f"convention: published {list(law.conventions)}, fitted {stated}")
    if mismatches:
        raise OverlayRefused(law_id, mismatches)
    return curve(law_id)


# Each form of the file that is a curve: the constants it needs and its equation.
_CURVES: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
    "P0": (("A", "alpha"), lambda p, x: p["A"] * x ** -p["alpha"]),
    "P1": (("E", "A", "alpha"), lambda p, x: p["E"] + p["A"] * x ** -p["alpha"]),
    "LL": (("a", "b"), lambda p, x: p["a"] - p["b"] * np.log(x)),
    "C": (
        ("E", "A", "B", "alpha", "beta"),
        lambda p, x1, x2: p["E"] + p["A"] * x1 ** -p["alpha"] + p["B"] * x2 ** -p["beta"],
    ),
    "GAIN": (("c", "gamma"), lambda p, x: p["c"] * x ** p["gamma"]),
    "HYPER": (
        ("c",),
        lambda p, *x: (
            p["c"] * np.prod(np.broadcast_arrays(*[v**e for v, e in zip(x, p["powers"], strict=True)]), axis=0)
        ),
    ),
}
_HYPER_POWERS = {"dense_params": "n", "examples": "d"}


def _constants(law: PublishedLaw) -> dict[str, Any]:
    """Printed constants under the names of `_CURVES`: logs undone, (x0 / x)^alpha as A x^-alpha."""
    constants = dict(law.parameters)
    for name in [key for key in constants if key.startswith("log_")]:
        constants[name.removeprefix("log_")] = float(np.exp(constants[name]))
    if "x0" in constants and "A" not in constants:
        constants["A"] = constants["x0"] ** constants["alpha"]
    if law.form == "HYPER":
        constants["powers"] = [constants[_HYPER_POWERS[axis]] for axis in law.axes]
    return constants


@functools.cache
def _read(name: str) -> Any:
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _record(section: str, record_id: str) -> dict[str, Any]:
    records = {record["id"]: record for record in _read("laws")[section]}
    if record_id not in records:
        nearest = names.nearest(record_id, records)
        raise KeyError(f"no entry {record_id!r} in section {section!r} of the published laws{nearest}")
    return records[record_id]


def _law(record: dict[str, Any]) -> PublishedLaw:
    axes = _as_tuple(record["axis"])
    same = ("id", "paper", "arxiv", "venue", "domain", "form", "equation", "n_points", "held_fixed", "caution")
    return PublishedLaw(
        **{name: record[name] for name in same},
        parameters=dict(record["parameters"]),
        axes=axes,
        axis_units=_per_axis(record["axis_unit"], axes),
        conventions=_per_axis(record["convention"], axes),
        range=_numeric_range(record["range"]),
        metrics=_as_tuple(record["metric"]),
        metric_ids=_as_tuple(record["metric_id"]),
        grade=record["provenance"]["grade"],
        grade_detail=record["provenance"].get("detail"),
        printed_as=record.get("printed_as"),
    )


def _as_tuple(value: str | list[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _per_axis(value: str | list[str | None] | None, axes: tuple[str, ...]) -> tuple[str | None, ...]:
    if value is None or isinstance(value, str):
        return (value,) * len(axes)
    return tuple(value)


def _numeric_range(value: Any) -> tuple[tuple[float, float], ...] | None:
    if value is None or isinstance(value, str):
        return None  # some sources state a range in words only
    pairs = value if isinstance(value[0], list) else [value]
    return tuple((float(low), float(high)) for low, high in pairs)
