"""Sweeps as data: a sweep is a list of points, a point is a flat dictionary {dotted configuration key: value}.

    axis("training.lr", [1e-3, 3e-3])                     2 points
    product(by_dense_params([1e3, 1e4]), seeds(3))        6 points, every pair
    zip(axis(a, ...), axis(b, ...))                       point i of each, laid over each other
    chain(first, second)                                  the points of one, then of the other

Nothing here knows a configuration: the planner lays each point strictly over the base configuration, so an unknown key
or a value of the wrong type is an error there.
"""

from __future__ import annotations

import builtins
import itertools
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


def by_memory_slots(slots: Iterable[int], key: str = "model.memory_slots", **fixed: Any) -> Sweep:
    """A ladder of memory slots, held in the architecture's setting `key`; `fixed` as in `by_dense_params`."""
    return _ladder(key, slots, fixed)


def seeds(count: int) -> Sweep:
    """Seeds 0 ... count - 1: replicas of one program that share every batch."""
    if count < 1:
        raise ValueError(f"seeds({count}): at least one seed is needed")
    return axis("seed", range(count))


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
