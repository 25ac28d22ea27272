"""What is known about the log a sweep was trained on: its asymptote, its entropy floor and its exponents.

On the known-truth log "true" has a precise and limited meaning:

    asymptote      E_inf, the loss with the resource unlimited: every term of the teacher known, its infinite tail
                   included. Below anything a finite log lets a model reach. It is the E of the law.
    entropy floor  H*, the loss of the Bayes predictor from the inputs a model is given. The best that can be reached.
    exponent       of the teacher in its own units: alpha per *quantum known*, a/(1+a) per example for a linear
                   learner, lambda per event seen, a - 1 per pair stored. A network's exponent in dense parameters
                   need not equal alpha: nothing says how many quanta a parameter buys.

A sweep holds its other resources where they are (rows of training above all), so the floor of its own law may lie above
the asymptote. A real log knows none of this and has no truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import runs
from .data.known_truth_config import KnownTruthConfig, preset

KNOWN_TRUTH = "known_truth"

# What the true exponent of an axis counts.
EXPONENT_UNITS = {
    "dense_params": "per quantum known",
    "examples": "per example, linear learner",
    "history_length": "per history event seen",
    "memory_slots": "per pair stored",
}

# Metrics in nats per label, on which asymptote and entropy floor can be drawn.
LOSSES = ("logloss", "progressive_logloss", "observed_logloss")

_KEYS = ("asymptote", "entropy_floor", "alpha", "exponents", "source")


@dataclass(frozen=True)
class Truth:
    """Known constants of a log; None and missing axes are unknown.

    asymptote, entropy_floor: nats per label. exponents: axis -> true exponent, see `EXPONENT_UNITS`.
    source: where the constants come from. notes: what could not be established, and why.
    """

    asymptote: float | None = None
    entropy_floor: float | None = None
    exponents: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def alpha(self) -> float | None:
        """The quanta exponent."""
        return self.exponents.get("dense_params")

    @property
    def known(self) -> bool:
        return self.asymptote is not None or self.entropy_floor is not None or bool(self.exponents)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with `alpha` on its own."""
        return {
            "asymptote": self.asymptote,
            "entropy_floor": self.entropy_floor,
            "alpha": self.alpha,
            "exponents": dict(self.exponents),
            "exponent_units": {axis: EXPONENT_UNITS.get(axis, "") for axis in self.exponents},
            "source": self.source,
            "notes": list(self.notes),
        }


def from_mapping(values: Mapping[str, Any]) -> Truth:
    """Truth the caller states: any of asymptote, entropy_floor, alpha, exponents (axis -> value), source.

    Raises:
        ValueError: an unknown key.
    """
    unknown = sorted(set(values) - {*_KEYS, "exponent_units", "notes"})
    if unknown:
        raise ValueError(f"truth has no key {', '.join(unknown)}; it takes {', '.join(_KEYS)}")
    exponents = dict(values.get("exponents") or {})
    if values.get("alpha") is not None:
        exponents.setdefault("dense_params", float(values["alpha"]))
    return Truth(
        values.get("asymptote"),
        values.get("entropy_floor"),
        exponents,
        str(values.get("source") or "given by the caller"),
    )


def find(table: pd.DataFrame, out_dir: Path | str | None = None) -> Truth:
    """Truth of the runs of a table: constants from its columns, exponents from the runs' own configurations.

    Runs of different logs have no common truth; then nothing is returned and `notes` says so.
    """
    notes: list[str] = []
    floor = _constant(table, "entropy_floor", notes)
    asymptote = _constant(table, "asymptote", notes)
    exponents, source = _exponents(table, out_dir, notes)
    columns = [name for name, value in (("asymptote", asymptote), ("entropy_floor", floor)) if value is not None]
    sources = [f"{' and '.join(columns)} from the run table"] if columns else []
    return Truth(asymptote, floor, exponents, "; ".join([*sources, *([source] if source else [])]), tuple(notes))


def exponents_of(config: KnownTruthConfig) -> dict[str, float]:
    """Axis -> true exponent of a known-truth log, for the parts the log has."""
    found: dict[str, float] = {}
    if config.has_n:
        found |= {"dense_params": config.alpha, "examples": config.alpha / (1.0 + config.alpha)}
    if config.has_l:
        found["history_length"] = config.lam
    if config.has_m:
        found["memory_slots"] = config.a - 1.0
    return found


def _constant(table: pd.DataFrame, column: str, notes: list[str]) -> float | None:
    if column not in table.columns:
        return None
    values = pd.to_numeric(table[column], errors="coerce").dropna().to_numpy(float)
    if not len(values):
        return None
    if np.ptp(values) > 1e-9 * max(abs(values.max()), 1.0):
        notes.append(f"{column} differs between runs ({values.min():.6g} to {values.max():.6g}): no single true value")
        return None
    return float(values[0])


def _exponents(table: pd.DataFrame, out_dir: Path | str | None, notes: list[str]) -> tuple[dict[str, float], str]:
    """Exponents from the configuration in the run records; without records, from the preset the table names."""
    configs = _recorded_configs(out_dir) if out_dir is not None else []
    source = "exponents from the run records"
    if not configs:
        configs, source = _named_presets(table), "exponents of the preset named in the run table"
    if not configs:
        return {}, ""
    found = [exponents_of(config) for config in configs]
    if any(one != found[0] for one in found[1:]):
        notes.append("runs were trained on logs with different exponents: no single true exponent")
        return {}, ""
    return found[0], source


def _recorded_configs(out_dir: Path | str) -> list[KnownTruthConfig]:
    configs = {}
    for folder in sorted((Path(out_dir) / "runs").glob("*")):
        data = ((runs.read_record(folder) or {}).get("config") or {}).get("data") or {}
        if data.get("name") == KNOWN_TRUTH:
            config = preset(data["preset"], **_lists_as_tuples(data.get("overrides") or {}))
            configs[config.hash] = config
    return list(configs.values())


def _named_presets(table: pd.DataFrame) -> list[KnownTruthConfig]:
    if "preset" not in table.columns or "dataset" not in table.columns:
        return []
    names = table.loc[table["dataset"] == KNOWN_TRUTH, "preset"].dropna().unique()
    return [preset(str(name)) for name in names]


def _lists_as_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; the configuration must be hashable."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
