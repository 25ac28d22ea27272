"""The shape of an architecture for a target: dense parameters, training FLOPs per row, or training FLOPs of a run.

Each architecture proposes shapes near a number of dense parameters, hardware-friendly ones first (`size_space`); the
first within the tolerance is taken. For a target in FLOPs the number of parameters to ask for is found by secant steps
on FLOPs per parameter, which changes slowly with size. Everything is arithmetic on closed forms; the result is checked
against the abstract parameter tree, so that no wrong closed form is ever planned with, and no memory is used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from recscale import models
from recscale.models.counts import Count
from recscale.models.inputs import Schema

from .abstract import abstract_model, tree_params

# Training FLOPs per dense parameter and row of a model made of matrix products used once: 2 forward, 4 backward.
_USUAL_FLOPS_PER_PARAM = 6.0

# Changes of the parameter target while looking for a target in FLOPs, and when to stop; two or three usually do.
_ROUNDS = 8
_CONVERGED = 0.01

# Small models come in coarse steps: the same FLOPs may need another number of parameters.
_AROUND = (1.0, 0.97, 1.03, 0.94, 1.06, 0.9, 1.1)

# How far above an impossible target the smallest possible shape is looked for, and how closely.
_DOUBLINGS = 20
_SMALLEST_RATIO = 1.02


@dataclasses.dataclass(frozen=True)
class SizeResult:
    """A solved size.

    Attributes:
        config: complete configuration of the architecture, for `models.build`.
        overrides: the settings the solver chose.
        count: closed forms of that configuration.
        quantity: "dense_params" or "train_flops".
        target, achieved: of that quantity; training FLOPs are per row, or of the whole run if `examples` was given.
        relative_error: achieved / target - 1.
        reachable: whether the error is within the tolerance; if not, this is the nearest shape found.
    """

    config: ConfigDict
    overrides: dict[str, Any]
    count: Count
    quantity: str
    target: float
    achieved: int
    relative_error: float
    reachable: bool


@dataclasses.dataclass
class _Best:
    """The candidate nearest to the target so far."""

    error: float = math.inf
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def size(
    model: str,
    schema: Schema,
    *,
    dense_params: float | None = None,
    train_flops: float | None = None,
    examples: float | None = None,
    config: Mapping[str, Any] | ConfigDict | None = None,
    tolerance: float = 0.03,
) -> SizeResult:
    """The friendliest shape within `tolerance` of the target, or else the nearest one, marked `reachable=False`.

    Args:
        model: registry name.
        schema: what the model reads; input projections are part of its size.
        dense_params: target of the parameters outside tables and memories.
        train_flops: target of forward and backward FLOPs per row (C = 1), or of a whole run of `examples` rows.
        examples: rows of the run `train_flops` refers to.
        config: settings to keep; the solver changes only those `size_space` names.
        tolerance: accepted relative error.

    Raises:
        ValueError: not exactly one target; a target that is not positive; or a closed form that differs from the
            abstract parameter tree.
    """
    quantity, target = _target(dense_params, train_flops, examples)
    base = _complete(model, config)
    if quantity == "dense_params":
        best = _nearest_params(model, schema, base, target, tolerance)
        scale = 1.0
    else:
        scale = examples or 1.0
        best = _nearest_flops(model, schema, base, target / scale, tolerance)
    if not best.overrides:
        raise ValueError(f"{model} proposes no shape near {target:.3g} {quantity} for this schema and configuration")
    chosen = ConfigDict(_merged(base, best.overrides))
    count = models.count(model, schema, chosen)
    _check_tree(model, schema, chosen, count)
    achieved = count.dense_params if quantity == "dense_params" else round(count.train_flops_per_row * scale)
    error = achieved / target - 1.0
    return SizeResult(chosen, dict(best.overrides), count, quantity, target, achieved, error, abs(error) <= tolerance)


def _target(dense_params: float | None, train_flops: float | None, examples: float | None) -> tuple[str, float]:
    given = {"dense_params": dense_params, "train_flops": train_flops}
    given = {name: float(value) for name, value in given.items() if value is not None}
    if len(given) != 1:
        named = ", ".join(given) or "none"
        raise ValueError(f"a size has exactly one target, dense_params or train_flops; given: {named}")
    if examples is not None and "dense_params" in given:
        raise ValueError("examples belong to a target in train_flops; dense_params do not depend on them")
    ((name, value),) = given.items()
    for label, number in ((name, value), ("examples", examples)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{label} is {number}, expected a positive number")
    return name, value


def _nearest_params(model: str, schema: Schema, base: dict, target: float, tolerance: float) -> _Best:
    def error(count: Count) -> float:
        return count.dense_params / target - 1.0

    best, first = _scan(model, schema, base, target, error, tolerance)
    return best if first is not None else _smallest(model, schema, base, target, error)[0]


def _nearest_flops(model: str, schema: Schema, base: dict, target: float, tolerance: float) -> _Best:
    """Finds the number of parameters whose FLOPs meet the target, then looks at the shapes around it."""
    params = target / _USUAL_FLOPS_PER_PARAM
    for _ in range(_ROUNDS):
        near = _nearest_params(model, schema, base, params, tolerance)
        if not near.overrides:
            break
        count = models.count(model, schema, _merged(base, near.overrides))
        before, params = params, target * count.dense_params / count.train_flops_per_row
        if abs(params / before - 1.0) < _CONVERGED:
            break

    def error(count: Count) -> float:
        return count.train_flops_per_row / target - 1.0

    best = _Best()
    for factor in _AROUND:
        found, _ = _scan(model, schema, base, params * factor, error, tolerance)
        best = min(best, found, key=lambda b: abs(b.error))
        if abs(best.error) <= tolerance:
            return best
    return best if best.overrides else _smallest(model, schema, base, params, error)[0]


def _scan(
    model: str, schema: Schema, base: dict, params: float, error: Callable[[Count], float], tolerance: float
) -> tuple[_Best, Count | None]:
    """The first proposal within tolerance, or the nearest; and the count of the very first (None: no proposal)."""
    best, first = _Best(), None
    for overrides in models.size_space(model, schema, base, params):
        count = models.count(model, schema, _merged(base, overrides))
        first = first or count
        off = error(count)
        if abs(off) < abs(best.error):
            best = _Best(off, overrides)
        if abs(off) <= tolerance:
            break
    return best, first


def _smallest(
    model: str, schema: Schema, base: dict, params: float, error: Callable[[Count], float]
) -> tuple[_Best, float]:
    """Where nothing is proposed (the inputs alone need more): the smallest number of parameters with proposals.

    Returns the nearest of those proposals and that number.
    """
    best, low, high = _Best(), params, params
    for _ in range(_DOUBLINGS):
        low, high = high, 2.0 * high
        best, first = _scan(model, schema, base, high, error, 0.0)
        if first is not None:
            break
    else:
        return best, params
    while high / low > _SMALLEST_RATIO:
        middle = math.sqrt(low * high)
        found, first = _scan(model, schema, base, middle, error, 0.0)
        if first is None:
            low = middle
        else:
            high, best = middle, min(best, found, key=lambda b: abs(b.error))
    return best, high


def _check_tree(model: str, schema: Schema, config: ConfigDict, count: Count) -> None:
    tree = tree_params(abstract_model(model, schema, config))
    if tree != count.dense_params:
        raise ValueError(
            f"{model}: the closed form says {count.dense_params} dense parameters, the model has {tree} "
            f"(difference {tree - count.dense_params}); its count_params is wrong for this configuration"
        )


def _complete(model: str, config: Mapping[str, Any] | ConfigDict | None) -> dict[str, Any]:
    """The architecture's defaults with the given settings over them; unknown settings are the registry's to refuse."""
    given = config.to_dict() if isinstance(config, ConfigDict) else dict(config or {})
    return _merged(models.get_config(model).to_dict(), given)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section."""
    merged = dict(base)
    for name, value in over.items():
        inside = merged.get(name)
        merged[name] = _merged(inside, value) if isinstance(inside, Mapping) and isinstance(value, Mapping) else value
    return merged
