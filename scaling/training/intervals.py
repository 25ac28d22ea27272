"""Metrics of a logging interval: per-step device values in, means over the interval's rows out, float64 on the host."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from recscale.scaling.data.metrics import entropy


def summarise(steps: list[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
    """Row-weighted means per replica of the batches of an interval, each scored before it was trained on.

    Args:
        steps: metrics of `Trainer.step`, still on the device.

    Returns:
        logloss, ne, calibration (sum of predictions / sum of labels), rows, rate, loss: each [P], of the first task;
        task_logloss [P, Y] when there are several tasks; model_<name> [P, ...] for everything the model reports.
    """
    fetched = jax.device_get(steps)
    rows = np.stack([np.broadcast_to(m["rows"], m["logloss"].shape) for m in fetched]).astype(np.float64)
    total = rows.sum(0)
    mean = {
        name: (np.stack([m[name] for m in fetched]).astype(np.float64) * rows).sum(0) / np.maximum(total, 1)
        for name in ("logloss", "prediction", "label")
    }
    base = np.clip(mean["label"], 1e-12, 1 - 1e-12)
    out = {
        "logloss": mean["logloss"][:, 0],
        "ne": (mean["logloss"] / entropy(base))[:, 0],
        "calibration": (mean["prediction"] / base)[:, 0],
        "rows": total[:, 0],
        "rate": np.asarray(fetched[-1]["rate"], np.float64),
        "loss": np.mean([m["loss"] for m in fetched], axis=0, dtype=np.float64),
    }
    if mean["logloss"].shape[1] > 1:
        out["task_logloss"] = mean["logloss"]
    for name in fetched[0].get("stats", {}):
        out[f"model_{name}"] = np.mean([m["stats"][name] for m in fetched], axis=0, dtype=np.float64)
    return out


def stack(steps: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Metrics of an unfinished interval, for a checkpoint: name -> [steps, ...], a model's own as stats/<name>."""
    fetched = [_flat(metrics) for metrics in jax.device_get(steps)]
    return {name: np.stack([metrics[name] for metrics in fetched]) for name in fetched[0]} if fetched else {}


def unstack(stored: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The steps' metrics that `stack` put together, bit for bit."""
    steps: list[dict[str, Any]] = [{"stats": {}} for _ in next(iter(stored.values()), ())]
    for name, values in stored.items():
        section, inside, own = name.partition("/")
        for metrics, value in zip(steps, values, strict=True):
            if inside:
                metrics[section][own] = value
            else:
                metrics[name] = value
    return steps


def _flat(metrics: dict[str, Any]) -> dict[str, np.ndarray]:
    own = {f"stats/{name}": value for name, value in metrics["stats"].items()}
    return {name: value for name, value in metrics.items() if name != "stats"} | own


def progressive_metrics(lines: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Test-then-train logloss over the last tenth of a run, from its metrics lines.

    Mean over whole logging intervals that end in the last tenth, at least one; with the number of rows it covers.
    """
    tail = [line for line in lines if line["step"] > 0.9 * steps] or lines[-1:]
    rows = sum(line["rows"] for line in tail)
    if not rows or any(line["logloss"] is None or not math.isfinite(line["logloss"]) for line in tail):
        return {"progressive_logloss": None, "progressive_rows": 0}
    mean = sum(line["logloss"] * line["rows"] for line in tail) / rows
    return {"progressive_logloss": mean, "progressive_rows": rows}
