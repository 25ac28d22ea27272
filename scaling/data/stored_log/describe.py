"""What a stored log holds, where it leaks, and what it cannot support: the figures of its card.

Counts are of all rows; whatever needs sorting or ranking is of evenly spaced rows, at most `SAMPLE` of a part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recscale.models.inputs import Field, Sequence
from recscale.scaling.data.metrics import auc, base_rate, entropy

from .gather import gather
from .packed import PackedLog
from .references import fit_references
from .vocabulary import UNKNOWN

SAMPLE = 200_000
LEAK_AUC = 0.95
_TIME_BINS = 10
_QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
_LONG_HISTORY, _ENOUGH_LONG = 50, 0.05
_FEW_ROWS = 100_000
_PRIOR_ROWS = 20.0  # strength with which a value's rate is drawn to the mean


def describe_log(log: PackedLog) -> dict[str, Any]:
    """The card as plain data: sizes, splits, labels, fields, histories, leaks, references and limits."""
    items = next((f for f in log.schema.candidate_fields if not f.is_dense), None)
    labels = {task.name: _label(log, y) for y, task in enumerate(log.schema.tasks)}
    histories = {sequence.name: _history(log, sequence) for sequence in log.schema.sequences}
    card = {
        "name": log.name,
        "identity": log.identity,
        "rows": len(log),
        "requests": len(log) if log.requests is None else int(log.requests[-1]) + 1,
        "candidates": _candidates(log),
        "users": log.meta["facts"].get("users"),
        "items": None if items is None else {"field": items.name, "values": (items.vocabulary or 2) - 2},
        "splits": {name: _split(log, start, end) for name, (start, end) in log.splits.items()},
        "labels": labels,
        "fields": [_field(log, field) for field in log.schema.fields],
        "histories": histories,
        "report": log.report.to_dict(),
        "facts": {key: log.meta["facts"].get(key) for key in ("sources", "split", "negatives", "time_unit", "licence")},
    }
    card["leaks"] = _leaks(log)
    card["references"] = fit_references(log)
    card["limits"] = _limits(log, card)
    return card


def _rows(log: PackedLog, *parts: str) -> np.ndarray:
    """Evenly spaced rows of the parts, at most SAMPLE of each."""
    found = []
    for part in parts:
        start, end = log.splits[part]
        found.append(np.arange(start, end, max(-(-(end - start) // SAMPLE), 1)))
    return np.concatenate(found)


def _values(log: PackedLog, field: Field, rows: np.ndarray) -> np.ndarray:
    at = rows if log.requests is None or field.side != "user" else log.requests[rows]
    return log.column(field.name)[at]


def _candidates(log: PackedLog) -> dict[str, float]:
    if log.requests is None:
        return {"mean": 1.0, "max": 1}
    counts = np.bincount(log.requests)
    return {"mean": float(counts.mean()), "max": int(counts.max())}


def _split(log: PackedLog, start: int, end: int) -> dict[str, Any]:
    times = None
    if log.times is not None and end > start and log.meta["facts"].get("time_unit") != "order":
        ends = (int(log.times[start:end].min()), int(log.times[start:end].max()))
        times = [str(np.datetime64(value // log.ticks_per_second, "s")) for value in ends]
    return {"rows": end - start, "times": times}


def _label(log: PackedLog, y: int) -> dict[str, Any]:
    rates = {}
    for name, (start, end) in log.splits.items():
        labels, mask = log.labels[start:end, y], log.label_mask[start:end, y]
        rates[name] = base_rate(labels, mask) if mask.any() else None
    order = np.arange(len(log)) if log.times is None else np.argsort(log.times, kind="stable")
    over_time = []
    for rows in np.array_split(order, _TIME_BINS):
        mask = log.label_mask[rows, y] > 0
        over_time.append(float(log.labels[rows, y][mask].mean()) if mask.any() else None)
    rate = rates.get("test")
    return {
        "observed_share": float(np.mean(log.label_mask[:, y])),
        "base_rate": rates,
        "over_time": over_time,
        "entropy": None if rate is None else entropy(rate),
    }


def _field(log: PackedLog, field: Field) -> dict[str, Any]:
    train = _values(log, field, _rows(log, "train"))
    found: dict[str, Any] = {"name": field.name, "side": field.side, "kind": "dense" if field.is_dense else "id"}
    if field.is_dense:
        after = np.quantile(train[:, 0], _QUANTILES).tolist() if len(train) else []
        raw = log.meta["facts"].get("dense", {}).get(field.name, {}).get("quantiles")
        return found | {"width": field.width, "quantiles": after, "raw_quantiles": raw}
    found["kind"] = "ids" if field.bag > 1 else "id"
    ids, counts = np.unique(train[train > 0], return_counts=True)
    missing = log.meta["facts"].get("missing", {}).get(field.table_name)
    shares = log.meta["facts"].get("out_of_vocabulary", {})
    present = train if field.bag == 1 else train.max(axis=1)
    return found | {
        "table": field.table_name,
        "vocabulary": field.vocabulary,
        "coverage": float(np.mean((present > 0) & (present != missing))) if len(present) else None,
        "unknown": {part: shares.get(part, {}).get(field.name) for part in ("valid", "test")},
        "top_share": float(counts.max() / counts.sum()) if ids.size else None,
    }


def _history(log: PackedLog, sequence: Sequence) -> dict[str, Any]:
    rows = _rows(log, "train", "test")
    store = log.events(sequence.name)
    starts, ends = store.offsets[log.keys(sequence.name)[rows]], log.ends(sequence.name)[rows]
    lengths = ends - starts
    found: dict[str, Any] = {
        "events": int(store.offsets[-1]),
        "length": dict(
            zip(("q50", "q90", "q99", "max"), np.quantile(lengths, [0.5, 0.9, 0.99, 1.0]).tolist(), strict=True)
        ),
        "empty_share": float(np.mean(lengths == 0)),
        "long_share": float(np.mean(lengths > _LONG_HISTORY)),
    }
    if store.times is not None and log.times is not None and sequence.timestamps and (lengths > 0).any():
        some = lengths > 0
        ages = (log.times[rows][some] - store.times[ends[some] - 1]) / log.ticks_per_second
        found["newest_age_s"] = dict(
            zip(("q10", "q50", "q90"), np.quantile(ages, [0.1, 0.5, 0.9]).tolist(), strict=True)
        )
        found["future_events"] = int(np.count_nonzero(ages <= 0))
    return found


def _leaks(log: PackedLog) -> list[dict[str, Any]]:
    """Single inputs and what they say about each label: AUC on held-out rows, of the training rate of their values."""
    train, held = _rows(log, "train"), _rows(log, "valid", "test")
    found = []
    for y, task in enumerate(log.schema.tasks):
        seen, mask = log.label_mask[train, y] > 0, log.label_mask[held, y] > 0
        labels = log.labels[held, y][mask]
        if not 0 < labels.sum() < len(labels):
            continue
        for field in log.schema.fields:
            scores = _scores(log, field, train[seen], log.labels[train, y][seen], held[mask])
            if scores is not None:
                value = auc(scores, labels)
                found.append({"task": task.name, "input": field.name, "auc": max(value, 1 - value)})
        for sequence in log.schema.sequences:
            inside = _in_history(log, sequence, held[mask])
            if inside is not None:
                value = auc(inside, labels)
                words = f"candidate is in {sequence.name}"
                found.append({"task": task.name, "input": words, "auc": max(value, 1 - value)})
    return sorted(found, key=lambda row: -row["auc"])


def _scores(log: PackedLog, field: Field, train: np.ndarray, labels: np.ndarray, held: np.ndarray) -> np.ndarray | None:
    values = _values(log, field, held)
    if field.is_dense:
        return values[:, 0].astype(float) if field.width <= 2 else None
    if field.bag > 1:
        return None
    shown = _values(log, field, train)
    rows = np.bincount(shown, minlength=field.vocabulary or 0)
    positives = np.bincount(shown, weights=labels, minlength=field.vocabulary or 0)
    rate = (positives + _PRIOR_ROWS * labels.mean()) / (rows + _PRIOR_ROWS)
    return rate[values]


def _in_history(log: PackedLog, sequence: Sequence, rows: np.ndarray) -> np.ndarray | None:
    """Whether a candidate id of the same table is among the newest events that runs read."""
    tables = {field.table_name: field for field in log.schema.candidate_fields if not field.is_dense and field.bag == 1}
    event = next((field for field in sequence.fields if field.table_name in tables), None)
    if event is None:
        return None
    rows = rows[:: max(len(rows) // SAMPLE, 1)]
    found = np.zeros(len(rows))
    for start in range(0, len(rows), 4096):
        piece = rows[start : start + 4096]
        batch = gather(log, log.schema, piece[:, None], np.ones((len(piece), 1), bool))
        ids = batch.user.histories[sequence.name].ids[event.name]
        own = batch.candidates.ids[tables[event.table_name].name]
        found[start : start + 4096] = ((ids == own) & (own > UNKNOWN)).any(axis=1)
    return found


def _limits(log: PackedLog, card: dict[str, Any]) -> list[str]:
    found = []
    if len(log) < _FEW_ROWS:
        found.append(f"{len(log):,} rows carry no exponent in data or parameters")
    start, end = log.splits["test"]
    if log.users is not None:
        _, user = np.unique(log.users[start:end], return_inverse=True)
        observed = log.label_mask[start:end, 0] > 0
        rows = np.bincount(user[observed], minlength=int(user.max()) + 1)
        positives = np.bincount(user[observed], weights=log.labels[start:end, 0][observed], minlength=rows.size)
        single = float(np.mean((positives == 0) | (positives == rows)))
        found.append(f"test users with one class: {100 * single:.0f} %, GAUC on the rest")
        if rows.mean() < 2:
            found.append("users hardly repeat in the test part: GAUC says little")
    else:
        found.append("no user: no GAUC, no histories")
    for name, history in card["histories"].items():
        if history["long_share"] < _ENOUGH_LONG:
            share = f"{100 * history['long_share']:.1f} %"
            found.append(f"{name}: histories over {_LONG_HISTORY} events: {share} of rows, no length axis")
    for field in card["fields"]:
        unknown = field.get("unknown", {}).get("test")
        if unknown is not None and unknown > 0.2:
            found.append(f"{field['name']}: {100 * unknown:.0f} % of test ids were never seen in training")
    if card["candidates"]["max"] == 1:
        found.append("one candidate a request: nothing is reused within a request")
    if card["facts"]["negatives"]:
        found.append("negatives are sampled: logloss and calibration hold for that sampling only")
    return found
