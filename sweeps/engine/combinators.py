"""Sweeps as data: a sweep is a list of points, a point is a flat dictionary {dotted configuration key: value}.

    axis("training.lr", [1e-3, 3e-3])                     2 points
    product(by_dense_params([1e3, 1e4]), seeds(3))        6 points, every pair
    zip(axis(a, ...), axis(b, ...))                       point i of each, laid over each other
    chain(first, second)                                  the points of one, then of the other
    rate_search(points, trials=3)                         every point at three rates, on rows of their own

Nothing here knows a configuration: the planner lays each point strictly over the base configuration, so an unknown key
or a value of the wrong type is an error there.
"""

from __future__ import annotations

import builtins
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = dict[str, Any]
Sweep = list[Point]


def axis(key: str, values: Iterable[Any]) -> Sweep:
    """One point per value of a dotted configuration key.

    Raises:
        ValueError: no values, or a value given twice.
    """
    values = list(values)
    if not values:
        raise ValueError(f"axis {key!r} has no values")
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ValueError(f"axis {key!r} gives {twice[0]!r} twice; name each value once")
    return [{key: value} for value in values]


def product(*sweeps: Sequence[Mapping[str, Any]]) -> Sweep:
    """Every combination of one point from each sweep; the last sweep varies fastest.

    Raises:
        ValueError: two factors set the same key.
    """
    return [_merge("product", points) for points in itertools.product(*sweeps)]


def zip_(*sweeps: Sequence[Mapping[str, Any]]) -> Sweep:
    """Point i of every sweep laid over each other (exported as `zip`).

    Raises:
        ValueError: sweeps of different lengths, or the same key in two of them.
    """
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise ValueError(f"zip needs sweeps of one length, got {lengths}; use product for every combination")
    return [_merge("zip", points) for points in builtins.zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Mapping[str, Any]]) -> Sweep:
    """The points of all sweeps, one sweep after the other."""
    return [dict(point) for sweep in sweeps for point in sweep]


def architectures(names: Iterable[str]) -> Sweep:
    """One point per registered architecture; the planner swaps `config.model` for that architecture's own defaults."""
    return axis("architecture", names)


def by_dense_params(targets: Iterable[float], **fixed: Any) -> Sweep:
    """A ladder of dense parameter counts; the planner finds the shape nearest to each target.

    Args:
        targets: dense parameters of each rung.
        fixed: further keys of every point, with `__` for the dot: `by_dense_params(targets, training__lr=1e-3)`.
    """
    return _ladder("size.dense_params", targets, fixed)


def by_train_flops(targets: Iterable[float], **fixed: Any) -> Sweep:
    """A ladder of training FLOPs per row (forward and backward); `fixed` as in `by_dense_params`."""
    return _ladder("size.train_flops", targets, fixed)


def by_flop_budget(budgets: Iterable[float], **fixed: Any) -> Sweep:
    """A ladder of whole-run FLOP budgets; the planner sets the number of examples each shape can afford. With
    `by_dense_params` as the other factor of a product these are isoFLOP groups; `fixed` as in `by_dense_params`."""
    return _ladder("size.budget_flops", budgets, fixed)


def by_history_length(lengths: Iterable[int], **fixed: Any) -> Sweep:
    """A ladder of history lengths: every history is cut to its newest events; `fixed` as in `by_dense_params`."""
    return _ladder("data.history_length", lengths, fixed)


def by_embedding_rows(rows: Iterable[int], **fixed: Any) -> Sweep:
    """A ladder of table sizes on a stored log: ids of larger tables are hashed; `fixed` as in `by_dense_params`."""
    return _ladder("data.embedding_rows", rows, fixed)


def by_embedding_width(widths: Iterable[int], **fixed: Any) -> Sweep:
    """A ladder of embedding widths on a stored log; `fixed` as in `by_dense_params`."""
    return _ladder("data.embedding_width", widths, fixed)


def by_memory_slots(slots: Iterable[int], key: str = "model.memory_slots", **fixed: Any) -> Sweep:
    """A ladder of memory slots, held in the architecture's setting `key`; `fixed` as in `by_dense_params`."""
    return _ladder(key, slots, fixed)


def seeds(count: int) -> Sweep:
    """Seeds 0 ... count - 1: replicas of one program that share every batch."""
    if count < 1:
        raise ValueError(f"seeds({count}): at least one seed is needed")
    return axis("seed", range(count))


# What a point may note about its runs besides their configuration, and in which column of the run table it ends.
NOTES = ("match_id", "arm", "lr_rule", "lr_trials", "lr_first_trials", "lr_bracketed")
_NOTE = "note."


def noted(points: Sequence[Mapping[str, Any]], **notes: Any) -> Sweep:
    """Points with notes: recorded with their runs, columns of the run table, no part of what is trained.

    match_id: equal for shapes of two architectures that are compared with each other; arm: what the run is called in a
    comparison of variants; lr_rule, lr_trials, lr_first_trials, lr_bracketed: how the rate was found, if it was
    elsewhere.

    Raises:
        ValueError: a note that no run table has a column for.
    """
    unknown = [name for name in notes if name not in NOTES]
    if unknown:
        raise ValueError(f"no run table has a column for the note {unknown[0]!r}; notes are {', '.join(NOTES)}")
    return [_merge("noted", (point, {_NOTE + name: value for name, value in notes.items()})) for point in points]


def split_notes(point: Mapping[str, Any]) -> tuple[Point, dict[str, Any]]:
    """A point without its notes, and the notes by name."""
    notes = {key.removeprefix(_NOTE): value for key, value in point.items() if key.startswith(_NOTE)}
    return {key: value for key, value in point.items() if not key.startswith(_NOTE)}, notes


# Of a search for rates: how many of a shape, and how far apart they are.
RATE_TRIALS, RATE_FACTOR = 3, 2.0


def rate_search(
    points: Sequence[Mapping[str, Any]], trials: int = RATE_TRIALS, factor: float = RATE_FACTOR, log_seed: int = 1
) -> Sweep:
    """A search for the learning rate of every shape, on a split of its own, with the same trials for all.

    Each point is tried at `trials` rates around its own `training.lr`, `factor` apart, with seed 0 and the rows of
    another stream of its log: no row that a rate was chosen on is trained on or evaluated again.

    Raises:
        ValueError: not 3 to 5 trials, a factor that is no step up, or a point without a rate.
    """
    if not 3 <= trials <= 5 or factor <= 1:
        raise ValueError(f"a rate search takes 3 to 5 trials, a factor above 1 apart; got {trials} and {factor}")
    found: Sweep = []
    for point in points:
        own = searched_for(point)
        if "training.lr" not in own:
            raise ValueError(f"a rate search starts from a rate, and {own} has no training.lr")
        named = {_NOTE + "match_id": searched_name(point)}
        for trial in range(trials):
            rate = rounded_rate(own["training.lr"] * factor ** (trial - (trials - 1) / 2))
            tried = own | {"training.lr": rate, "seed": 0, "data.log_seed": log_seed} | named
            if tried not in found:
                found.append(tried)
    return found


def rounded_rate(rate: float) -> float:
    """A rate to two digits, as a search tries it."""
    return float(f"{rate:.2g}")


def searched_for(point: Mapping[str, Any]) -> Point:
    """A point without its seed, its stream and its notes: what has one best rate."""
    return {key: value for key, value in split_notes(point)[0].items() if key not in ("seed", "data.log_seed")}


def searched_name(point: Mapping[str, Any]) -> str:
    """The `match_id` of a point's trials in the run table of a rate search."""
    return hashlib.sha256(json.dumps(searched_for(point), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _ladder(key: str, values: Iterable[Any], fixed: Mapping[str, Any]) -> Sweep:
    constant = {name.replace("__", "."): value for name, value in fixed.items()}
    return [_merge("ladder", (point, constant)) for point in axis(key, values)]


def _merge(what: str, points: Iterable[Mapping[str, Any]]) -> Point:
    merged: Point = {}
    for point in points:
        both = merged.keys() & point.keys()
        if both:
            raise ValueError(f"{what}: {', '.join(sorted(both))} is set by two sweeps; set each key in one of them")
        merged.update(point)
    return merged
