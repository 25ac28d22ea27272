"""Metrics of a logging interval: per-step device values in, means over the interval's rows out, float64 on the host."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from recscale.scaling.data.metrics import entropy

_BANK = "model_bank/"

# Normalised entropy of a logging interval below which a run has learned more than the base rate.
_STARTED = 0.98


class Piece(NamedTuple):
    """Metrics of consecutive steps of a logging interval, still on the device.

    metrics: those of `Trainer.step`, a dictionary a step; or one of `Trainer.steps`, with room for more than `steps`.
    """

    metrics: list[dict[str, Any]] | dict[str, Any]
    steps: int


def fetch(pieces: list[Piece]) -> dict[str, Any]:
    """The metrics of an interval on the host, every one [steps, ...]."""
    return jax.tree.map(lambda *values: np.concatenate(values), *(_fetched(piece) for piece in pieces))


def _fetched(piece: Piece) -> dict[str, Any]:
    found = jax.device_get(piece.metrics)
    if isinstance(found, list):
        return jax.tree.map(lambda *values: np.stack(values), *found)
    return jax.tree.map(lambda values: values[: piece.steps], found)


def summarise(fetched: dict[str, Any]) -> dict[str, np.ndarray]:
    """Row-weighted means per replica of the batches of an interval, each scored before it was trained on.

    Args:
        fetched: of an interval, see `fetch`.

    Returns:
        logloss, ne, calibration (sum of predictions / sum of labels), rows, rate, loss: each [P], of the first task;
        task_logloss [P, Y] when there are several tasks; model_<name> [P, ...] for everything the model reports.
    """
    rows = np.broadcast_to(fetched["rows"], fetched["logloss"].shape).astype(np.float64)
    total = rows.sum(0)
    mean = {
        name: (fetched[name].astype(np.float64) * rows).sum(0) / np.maximum(total, 1)
        for name in ("logloss", "prediction", "label")
    }
    base = np.clip(mean["label"], 1e-12, 1 - 1e-12)
    out = {
        "logloss": mean["logloss"][:, 0],
        "ne": (mean["logloss"] / entropy(base))[:, 0],
        "calibration": (mean["prediction"] / base)[:, 0],
        "rows": total[:, 0],
        "rate": fetched["rate"][-1].astype(np.float64),
        "loss": fetched["loss"].mean(axis=0, dtype=np.float64),
    }
    if mean["logloss"].shape[1] > 1:
        out["task_logloss"] = mean["logloss"]
    for name, values in fetched.get("stats", {}).items():
        out[f"model_{name}"] = values.mean(axis=0, dtype=np.float64)
    return out


def stack(pieces: list[Piece]) -> dict[str, np.ndarray]:
    """Metrics of an unfinished interval, for a checkpoint: name -> [steps, ...], a model's own as stats/<name>."""
    if not pieces:
        return {}
    found = fetch(pieces)
    return found | {f"stats/{name}": values for name, values in found.pop("stats").items()}


def unstack(stored: dict[str, np.ndarray]) -> list[Piece]:
    """The interval that `stack` put away, bit for bit."""
    if not stored:
        return []
    metrics: dict[str, Any] = {"stats": {}}
    for name, values in stored.items():
        section, inside, own = name.partition("/")
        if inside:
            metrics[section][own] = values
        else:
            metrics[name] = values
    return [Piece(metrics, len(next(iter(stored.values()))))]


def progressive_metrics(lines: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Test-then-train logloss over the last tenth of a run, from its metrics lines, and when it started to learn.

    Mean over whole logging intervals that end in the last tenth, at least one; with the number of rows it covers. What
    a model says of its bank is averaged likewise: bank_cosine, bank_error, ... examples_to_start: rows trained on at
    the end of the first interval whose logloss is 2 % below that of the base rate; None where there is none.
    """
    below = (line["examples"] for line in lines if (line.get("ne") or 1.0) < _STARTED)
    started = {"examples_to_start": next(below, None)}
    tail = [line for line in lines if line["step"] > 0.9 * steps] or lines[-1:]
    rows = sum(line["rows"] for line in tail)
    if not rows or any(line["logloss"] is None or not math.isfinite(line["logloss"]) for line in tail):
        return {"progressive_logloss": None, "progressive_rows": 0} | started
    mean = sum(line["logloss"] * line["rows"] for line in tail) / rows
    names = [name for name in tail[-1] if name.startswith(_BANK)]
    values = np.asarray([[line[name] for name in names] for line in tail], float)
    bank = {name.replace(_BANK, "bank_"): float(value) for name, value in zip(names, values.mean(axis=0), strict=True)}
    return {"progressive_logloss": mean, "progressive_rows": rows} | bank | started
