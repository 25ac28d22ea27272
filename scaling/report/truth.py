"""What is known about the log a sweep was trained on: its asymptote, its entropy floor and its exponents.

On the known-truth log "true" has a precise and limited meaning:

    asymptote      E_inf, the loss with the resource unlimited: every term of the teacher known, its infinite tail
                   included. Below anything a finite log lets a model reach. It is the E of the law.
    entropy floor  H*, the loss of the Bayes predictor from the inputs a model is given. The best that can be reached.
    exponent       of the teacher in its own units: alpha per *quantum known*, a/(1+a) per example for a linear
                   learner, lambda per event seen, a - 1 per pair stored. It is no network's exponent: nothing says how
                   many quanta a parameter buys. What may stand beside a fitted exponent is in `estimands`.

E_inf is the asymptote of an axis only where the log has no other resource to be short of. On a log with a history or
pairs, the asymptote of one axis keeps the others as in the runs: `Truth.floor(axis)`. Neither knows how many examples a
sweep trained on: its own floor may lie above both. A real log knows none of this and has no truth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recscale.scaling.data.known_truth.config import KnownTruthConfig, preset
from recscale.scaling.data.known_truth.expectations import gaussian_constants
from recscale.scaling.data.known_truth.laws import has_exact, predict
from recscale.scaling.data.known_truth.world import build_world
from recscale.scaling.records import runs

KNOWN_TRUTH = "known_truth"

# What the true exponent of an axis counts.
EXPONENT_UNITS = {
    "dense_params": "per quantum known",
    "examples": "per example, linear learner",
    "history_length": "per history event seen",
    "memory_slots": "per pair stored",
}

_NO_FLOORS = (
    "the log has several resources and its card is not recorded: the asymptote shown is that of all of them, "
    "the true floor of one axis lies above it"
)

# How far a preset's asymptote, and the noise between it and the entropy floor, may lie from what a table says of its
# log: as far as its logits are from normal ones; a setting that was changed moves them further.
_SAME_ASYMPTOTE, _SAME_NOISE = 0.03, 0.15

_KEYS = ("asymptote", "entropy_floor", "alpha", "exponents", "floors", "source")


@dataclass(frozen=True)
class Truth:
    """Known constants of a log; None and missing axes are unknown.

    asymptote, entropy_floor: nats per label. exponents: axis -> true exponent, see `EXPONENT_UNITS`.
    floors: axis -> asymptote with only that resource (and data) unlimited, where it is not `asymptote`.
    source: where the constants come from. notes: what could not be established, and why. log: the one log of all runs,
    where its settings are known.
    """

    asymptote: float | None = None
    entropy_floor: float | None = None
    exponents: Mapping[str, float] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()
    log: Log | None = field(default=None, compare=False)

    @property
    def alpha(self) -> float | None:
        """The quanta exponent."""
        return self.exponents.get("dense_params")

    def floor(self, axis: str) -> float | None:
        """The true E of a law along this axis: that resource unlimited, the log's others as in the runs."""
        return self.floors.get(axis, self.asymptote)

    @property
    def known(self) -> bool:
        return self.asymptote is not None or self.entropy_floor is not None or bool(self.exponents)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with `alpha` on its own."""
        return {
            "asymptote": self.asymptote,
            "floors": dict(self.floors),
            "entropy_floor": self.entropy_floor,
            "alpha": self.alpha,
            "exponents": dict(self.exponents),
            "exponent_units": {axis: EXPONENT_UNITS.get(axis, "") for axis in self.exponents},
            "source": self.source,
            "notes": list(self.notes),
        }


def from_mapping(values: Mapping[str, Any]) -> Truth:
    """Truth the caller states: any of asymptote, entropy_floor, alpha, exponents and floors (axis -> value), source.

    What `Truth.as_dict` returned is read back.

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
        dict(values.get("floors") or {}),
        str(values.get("source") or "given by the caller"),
        tuple(values.get("notes") or ()),
    )


def find(table: pd.DataFrame, out_dir: Path | str | None = None) -> Truth:
    """Truth of the runs of a table: constants from its columns, exponents and floors from the runs' records.

    Runs of different logs have no common truth; then nothing is returned and `notes` says so.
    """
    notes: list[str] = []
    floor = _constant(table, "entropy_floor", notes)
    asymptote = _constant(table, "asymptote", notes)
    columns = [name for name, value in (("asymptote", asymptote), ("entropy_floor", floor)) if value is not None]
    sources = [f"{' and '.join(columns)} from the run table"] if columns else []
    logs = recorded = _recorded_logs(out_dir) if out_dir is not None else []
    exponents = _common([exponents_of(log.config) for log in logs], "exponents", notes)
    floors = _common([_floors(log, notes) for log in logs], "asymptotes per axis", notes)
    if recorded:
        sources.append("exponents from the run records")
    else:
        named = _named_presets(table)
        configs = [config for config, _ in named]
        logs = [Log(config, None, {}) for config, told in named if told or _is_of(config, asymptote, floor)]
        exponents = _common([exponents_of(config) for config in configs], "exponents", notes)
        sources += ["exponents of the preset named in the run table"] if exponents else []
        if any(config.has_l or config.has_m for config in configs):
            notes.append(_NO_FLOORS)
    return Truth(asymptote, floor, exponents, floors, "; ".join(sources), tuple(dict.fromkeys(notes)), _one(logs))


def _one(logs: list[Log]) -> Log | None:
    """The log of all runs; histories of several lengths are shown of one log."""
    if len({log.config.hash for log in logs}) != 1:
        return None
    lengths = {log.history_length for log in logs}
    return logs[0] if len(lengths) == 1 else replace(logs[0], history_length=None)


def _is_of(config: KnownTruthConfig, asymptote: float | None, floor: float | None) -> bool:
    """Whether constants of a table can be those of a preset as it stands: settings may have been changed."""
    if asymptote is None or floor is None or not has_exact(config):
        return False
    constants = gaussian_constants(config.b, config.signal)
    noise = predict(build_world(config), exact=True, constants=constants) - constants["asymptote"]
    alike = abs(asymptote / constants["asymptote"] - 1) < _SAME_ASYMPTOTE
    return bool(alike and abs((floor - asymptote) / noise - 1) < _SAME_NOISE)


def exponents_of(config: KnownTruthConfig) -> dict[str, float]:
    """Axis -> true exponent of a known-truth log, for the parts the log has."""
    found: dict[str, float] = {}
    if config.has_n:
        found |= {"dense_params": config.alpha, "examples": config.alpha / (1.0 + config.alpha)}
    if config.has_l:
        found["history_length"] = config.lam
    if config.has_m and config.a:
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


@dataclass(frozen=True)
class Log:
    """One log of a sweep as its runs recorded it; card: its constants, empty if they were not recorded."""

    config: KnownTruthConfig
    history_length: int | None
    card: Mapping[str, Any]


def _common(found: list[dict[str, float]], what: str, notes: list[str]) -> dict[str, float]:
    """Entries that all logs share."""
    shared = (
        {axis: value for axis, value in found[0].items() if all(one.get(axis) == value for one in found)}
        if found
        else {}
    )
    differing = sorted({axis for one in found for axis in one} - set(shared))
    if differing:
        notes.append(f"runs were trained on logs with different {what} ({', '.join(differing)}): none is common to all")
    return shared


def _floors(log: Log, notes: list[str]) -> dict[str, float]:
    """Axis -> loss with that resource unlimited and the others as in the runs, for logs with several resources."""
    config = log.config
    if not (config.has_l or config.has_m):
        return {}
    if not {"asymptote", "v"} <= set(log.card):
        notes.append(_NO_FLOORS)
        return {}
    world = build_world(config)
    # The second-order form covers what the exact integral does not know.
    own = {"history_length": log.history_length, "exact": has_exact(config)}
    unlimited = {
        "dense_params": {"quanta": np.inf},
        "train_flops": {"quanta": np.inf},
        "history_length": {"history_length": np.inf},
        "memory_slots": {"ranks": np.inf},
    }
    return {axis: float(predict(world, constants=log.card, **{**own, **free})) for axis, free in unlimited.items()}


def _recorded_logs(out_dir: Path | str) -> list[Log]:
    logs: dict[tuple[str, int | None], Log] = {}
    for folder in sorted((Path(out_dir) / "runs").glob("*")):
        record = runs.read_record(folder) or {}
        data = (record.get("config") or {}).get("data") or {}
        if data.get("name") == KNOWN_TRUTH:
            config = preset(data["preset"], **(data.get("overrides") or {}))
            length = data.get("history_length") or None
            card = (record.get("data") or {}).get("card") or {}
            logs.setdefault((config.hash, length), Log(config, length, card))
    return list(logs.values())


def _named_presets(table: pd.DataFrame) -> list[tuple[KnownTruthConfig, bool]]:
    """The logs that a run table names, and whether it also says what was changed of their presets."""
    if "preset" not in table.columns or "dataset" not in table.columns:
        return []
    rows = table[table["dataset"] == KNOWN_TRUTH]
    told = "preset_changes" in table.columns
    changes = rows["preset_changes"] if told else pd.Series(None, rows.index, dtype=object)
    named = pd.DataFrame({"preset": rows["preset"], "changes": changes.astype(object)}).dropna(subset="preset")
    return [
        (preset(str(name), **(json.loads(text) if isinstance(text, str) else {})), told)
        for name, text in named.drop_duplicates().itertuples(index=False)
    ]
