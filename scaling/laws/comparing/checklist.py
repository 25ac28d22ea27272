"""The checklist behind "X scales better than Y": every item ticked, not ticked, or not recorded, with what
was found.

Items marked `required` must be ticked before a comparison may answer yes or no; the others are printed so
that a reader can judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from recscale.scaling.data.metrics import describe

from .pairing import PairedSize, most_pairs

MIN_SIZES, MIN_DECADES = 5, 2.0
MIN_SEEDS, MIN_SEEDED_SIZES = 3, 2
_COUNTS = ("dense_params", "active_params", "embedding_params", "train_flops_per_row", "wall_s")
_STREAM = ("dataset", "data_seed", "epochs", "negative_sampling", "table_start")


@dataclass(frozen=True)
class Item:
    """One line of the checklist. `ticked` is None when the table does not record what the item needs."""

    id: str
    text: str
    ticked: bool | None
    detail: str
    required: bool


@dataclass(frozen=True)
class Evidence:
    """What the comparison itself found, as far as the checklist needs it; None where it could not be
    computed.
    """

    intervals_from_bootstrap: bool
    admissible_models: int
    held_out_order_right: bool | None
    held_out_detail: str
    specification_detail: str
    specifications_agree: bool | None
    diverged: Mapping[str, int] | None
    table_hash: str


def checklist(
    rows: pd.DataFrame,
    is_a: np.ndarray,
    names: tuple[str, str],
    axis: str,
    target: str,
    paired: list[PairedSize],
    paired_note: str,
    evidence: Evidence,
    *,
    min_paired_seeds: int,
    equalised: str | None,
    known_truth: str | None,
) -> list[Item]:
    """All items for rows of two architectures (`is_a` marks the first). `known_truth` names the record of the
    recovery run.
    """
    sides = [(names[0], rows[is_a]), (names[1], rows[~is_a])]
    pairs = most_pairs(paired)
    return [
        _learning_rate(sides),
        _sizes(sides, axis),
        _seeds(sides, axis),
        Item(
            "paired_seeds", f"at least {min_paired_seeds} paired seeds at one size",
            pairs >= min_paired_seeds, f"{pairs} at most; {paired_note}", True,
        ),
        _divergences(evidence.diverged),
        _stream(sides),
        _counts(rows, axis, equalised),
        Item("primary_metric", "logloss (or a rescaling) is the metric", describe(target).is_loss, target, True),
        Item(
            "held_out", "largest size held out and its order predicted", evidence.held_out_order_right,
            evidence.held_out_detail, True,
        ),
        _difference(evidence),
        Item(
            "specification_curve", "the sign of the difference survives other specifications",
            evidence.specifications_agree, evidence.specification_detail, True,
        ),
        Item(
            "known_truth", "the same pipeline recovers known exponents on the known-truth log",
            True if known_truth else None, known_truth or "no record given", False,
        ),
        _attached(rows, evidence.table_hash),
    ]  # fmt: skip


def missing(items: list[Item]) -> list[str]:
    """Reasons why no claim may be made: required items that are not ticked."""
    return [
        f"{item.text}: {'not recorded' if item.ticked is None else 'no'} ({item.detail})"
        for item in items
        if item.required and item.ticked is not True
    ]


def _learning_rate(sides: list[tuple[str, pd.DataFrame]]) -> Item:
    """Trials are equal where every search began with as many. Where the best of them was the lowest or highest a search
    goes on by one rule for all, or its optimum would not be interior: those further trials are told, not compared."""
    text = "interior learning-rate optimum per size for both, with equal trials"
    details, states = [], []
    trials, first = [], []
    for name, rows in sides:
        bracketed = rows.get("lr_bracketed")
        if bracketed is None or bracketed.isna().any():
            states.append(None)
            details.append(f"{name}: lr_bracketed not recorded")
            continue
        open_runs = int((~bracketed.astype(bool)).sum())
        states.append(open_runs == 0)
        details.append(f"{name}: {open_runs} of {len(rows)} runs not bracketed")
        trials.append(_distinct(rows, "lr_trials"))
        first.append(_distinct(rows.assign(begun=_begun(rows)), "begun"))
    if None in states:
        return Item("learning_rate", text, None, "; ".join(details), True)
    equal = len(first) == 2 and first[0] == first[1] and bool(first[0])
    details.append(f"trials {trials[0]} and {trials[1]}" if all(trials) else "lr_trials not recorded")
    if all(first) and first != trials:
        details.append(f"at first {first[0]} and {first[1]}")
    return Item("learning_rate", text, (all(states) and equal) if all(trials) else None, "; ".join(details), True)


def _begun(rows: pd.DataFrame) -> pd.Series | None:
    """Trials that a search began with; where that is not recorded, all it had."""
    trials, first = rows.get("lr_trials"), rows.get("lr_first_trials")
    return trials if trials is None or first is None else first.where(first.notna(), trials)


def _sizes(sides: list[tuple[str, pd.DataFrame]], axis: str) -> Item:
    details, fine = [], True
    for name, rows in sides:
        values = rows[axis].to_numpy(float)
        decades = float(np.log10(values.max() / values.min()))
        count = len(np.unique(values))
        fine = fine and count >= MIN_SIZES and decades >= MIN_DECADES - 1e-9
        details.append(f"{name}: {count} values over {decades:.2f} decades")
    text = f"at least {MIN_SIZES} values of {axis} over at least {MIN_DECADES:g} decades for both"
    return Item("sizes", text, fine, "; ".join(details), True)


def _seeds(sides: list[tuple[str, pd.DataFrame]], axis: str) -> Item:
    text = f"at least {MIN_SEEDS} seeds at {MIN_SEEDED_SIZES} or more sizes including a large one"
    if any("seed" not in rows.columns for _, rows in sides):
        return Item("seeds", text, None, "seed not recorded", True)
    details, fine = [], True
    for name, rows in sides:
        log_x = np.log(rows[axis].to_numpy(float))
        per_size = pd.DataFrame({"x": log_x, "seed": rows["seed"].to_numpy()}).groupby("x")["seed"].nunique()
        seeded = per_size[per_size >= MIN_SEEDS]
        # "Large": in the upper third of the range on a log scale.
        large = bool((seeded.index >= log_x.max() - np.ptp(log_x) / 3).any())
        fine = fine and len(seeded) >= MIN_SEEDED_SIZES and large
        details.append(f"{name}: {len(seeded)} sizes with {MIN_SEEDS}+ seeds, {'one' if large else 'none'} large")
    return Item("seeds", text, fine, "; ".join(details), True)


def _divergences(diverged: Mapping[str, int] | None) -> Item:
    text = "diverged runs are counted"
    if diverged is None:
        return Item("divergences", text, None, "the table has no status column", False)
    return Item("divergences", text, True, "; ".join(f"{name}: {count}" for name, count in diverged.items()), False)


def _stream(sides: list[tuple[str, pd.DataFrame]]) -> Item:
    text = "same data stream"
    found = {c: [_distinct(rows, c) for _, rows in sides] for c in _STREAM}
    recorded = {c: values for c, values in found.items() if all(values)}
    differing = [f"{c}: {values[0]} against {values[1]}" for c, values in recorded.items() if values[0] != values[1]]
    if differing:
        return Item("data_stream", text, False, "; ".join(differing), True)
    if not {"dataset", "data_seed"} <= set(recorded):
        absent = sorted({"dataset", "data_seed"} - set(recorded))
        return Item("data_stream", text, None, f"{' and '.join(absent)} not recorded", True)
    return Item("data_stream", text, True, "equal: " + ", ".join(recorded), True)


def _counts(rows: pd.DataFrame, axis: str, equalised: str | None) -> Item:
    absent = [c for c in _COUNTS if c not in rows.columns or rows[c].isna().any()]
    held = f"equalised: {equalised}" if equalised else f"compared along {axis}"
    detail = f"not recorded: {', '.join(absent)}; {held}" if absent else held
    text = "three parameter counts, FLOPs per row and wall clock given, and which was equalised"
    return Item("counts", text, None if absent else True, detail, False)


def _difference(evidence: Evidence) -> Item:
    fine = evidence.intervals_from_bootstrap and evidence.admissible_models >= 2
    kind = "cluster bootstrap" if evidence.intervals_from_bootstrap else "no bootstrap (too few clusters or draws)"
    detail = f"{kind}, {evidence.admissible_models} admissible models"
    return Item("difference_test", "difference of exponents tested under two admissible models", fine, detail, True)


def _attached(rows: pd.DataFrame, table_hash: str) -> Item:
    fine = "run_id" in rows.columns and "seed" in rows.columns
    detail = f"table {table_hash}" if fine else f"table {table_hash}; run_id or seed not recorded"
    return Item("attached", "run table and seeds attached", True if fine else None, detail, False)


def _distinct(rows: pd.DataFrame, column: str) -> list[str]:
    """Sorted distinct values as text; empty when the column is missing or has gaps."""
    if column not in rows.columns or rows[column].isna().any():
        return []
    values = (int(v) if isinstance(v, float) and v.is_integer() else v for v in rows[column])
    return sorted({str(value) for value in values})
