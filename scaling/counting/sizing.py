"""The shape of an architecture for a target: dense parameters, training FLOPs per row, or training FLOPs of a run.

Each architecture proposes shapes near a number of dense parameters, hardware-friendly ones first (`size_space`); the
first within the tolerance is taken. For a target in FLOPs the number of parameters to ask for is found by secant steps
on FLOPs per parameter, which changes slowly with size. The sizes of a ladder are chosen together, so that no setting
falls where the target rises. Everything is arithmetic on closed forms; the result is checked
against the abstract parameter tree, so that no wrong closed form is ever planned with, and no memory is used.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

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

# Where a search upwards for an encoder's parameters ends.
_MOST_PARAMS = 1e12

# Small models come in coarse steps: the same FLOPs may need another number of parameters.
_AROUND = (1.0, 0.97, 1.03, 0.94, 1.06, 0.9, 1.1)

# Shapes within the tolerance that are looked at where the sizes of a ladder are chosen together.
_LADDER_SHAPES = 48

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


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is sized: a model, what it reads, the settings it starts from, and what its encoder has of the size."""

    model: str
    schema: Schema
    base: dict[str, Any]
    split: Mapping[str, Any]

    def count(self, overrides: Mapping[str, Any]) -> Count:
        return models.count(self.model, self.schema, _merged(self.base, overrides))


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
    **split: Any,
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
        split: `encoder_share` or `fixed` of `models.size_space`: what a sequence encoder has of the size.

    Raises:
        ValueError: not exactly one target; a target that is not positive; or a closed form that differs from the
            abstract parameter tree.
    """
    quantity, target = _target(dense_params, train_flops, examples)
    problem, scale = _Problem(model, schema, _complete(model, config), split), examples or 1.0
    (best,) = _shapes(problem, quantity, target / scale, tolerance, 1)
    return _result(problem, quantity, target, best.overrides, scale, tolerance)


def size_ladder(
    model: str,
    schema: Schema,
    quantity: Literal["dense_params", "train_flops"],
    targets: Iterable[float],
    *,
    config: Mapping[str, Any] | ConfigDict | None = None,
    tolerance: float = 0.03,
    **split: Any,
) -> tuple[dict[float, SizeResult], bool]:
    """The sizes of a ladder, chosen together: of the shapes within the tolerance of each target those, friendliest
    first, in which no setting falls where the target rises.

    Returns {target: its size}, and whether there are such shapes; if not, each size is the one `size` gives.

    Raises:
        ValueError: as `size`.
    """
    rungs = sorted(
        {_target(**{"dense_params": None, "train_flops": None, quantity: t}, examples=None)[1] for t in targets}
    )
    problem = _Problem(model, schema, _complete(model, config), split)
    few = 1 if len(rungs) == 1 else _LADDER_SHAPES
    shapes = [_shapes(problem, quantity, target, tolerance, few) for target in rungs]
    rising = _rising([[shape.overrides for shape in found] for found in shapes])
    chosen = rising or [found[0].overrides for found in shapes]
    results = {
        target: _result(problem, quantity, target, overrides, 1.0, tolerance)
        for target, overrides in zip(rungs, chosen, strict=True)
    }
    return results, rising is not None


def _rising(ladder: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]] | None:
    """One shape a rung so that no setting falls from one rung to the next, with the smallest sum of places in the
    lists; None if there are none."""
    costs: list[list[float]] = [list(map(float, range(len(ladder[0]))))]
    befores: list[list[int]] = [[-1] * len(ladder[0])]
    for lower, upper in itertools.pairwise(ladder):
        cost, before = [], []
        for place, shape in enumerate(upper):
            reached = [c if _no_fall(below, shape) else math.inf for c, below in zip(costs[-1], lower, strict=True)]
            best = min(range(len(reached)), key=reached.__getitem__)
            cost.append(reached[best] + place)
            before.append(best)
        costs.append(cost)
        befores.append(before)
    at = min(range(len(costs[-1])), key=costs[-1].__getitem__)
    if math.isinf(costs[-1][at]):
        return None
    chosen = []
    for shapes, before in zip(reversed(ladder), reversed(befores), strict=True):
        chosen.append(shapes[at])
        at = before[at]
    return chosen[::-1]


def _no_fall(small: Mapping[str, Any], large: Mapping[str, Any]) -> bool:
    """Whether every setting of both is as large in the second, inside sections and tuples; what is no number: equal."""

    def pair(low: Any, high: Any) -> bool:
        if isinstance(low, Mapping) and isinstance(high, Mapping):
            return _no_fall(low, high)
        if isinstance(low, tuple | list) and isinstance(high, tuple | list):
            return len(low) == len(high) and all(map(pair, low, high))
        if isinstance(low, int | float) and isinstance(high, int | float):
            return low <= high
        return low == high

    return all(pair(value, large[name]) for name, value in small.items() if name in large)


def _shapes(problem: _Problem, quantity: str, target: float, tolerance: float, most: int) -> list[_Best]:
    """The `most` friendliest shapes within the tolerance; if there is none, the nearest.

    Raises:
        ValueError: nothing at all is proposed.
    """
    solve = _nearest_params if quantity == "dense_params" else _nearest_flops
    found = solve(problem, target, tolerance, most)
    if not found:
        raise ValueError(
            f"{problem.model} proposes no shape near {target:.3g} {quantity} for this schema and configuration"
        )
    return found


def _result(
    problem: _Problem, quantity: str, target: float, overrides: Mapping[str, Any], scale: float, tolerance: float
) -> SizeResult:
    """A chosen shape with its counts, which the abstract parameter tree has to agree with."""
    chosen, count = ConfigDict(_merged(problem.base, overrides)), problem.count(overrides)
    _check_tree(problem.model, problem.schema, chosen, count)
    achieved = count.dense_params if quantity == "dense_params" else round(count.train_flops_per_row * scale)
    error = achieved / target - 1.0
    return SizeResult(chosen, dict(overrides), count, quantity, target, achieved, error, abs(error) <= tolerance)


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


def _nearest_params(problem: _Problem, target: float, tolerance: float, most: int) -> list[_Best]:
    def error(count: Count) -> float:
        return count.dense_params / target - 1.0

    found, first = _scan(problem, target, error, tolerance, most)
    return found if first is not None else _smallest(problem, target, error)


def _nearest_flops(problem: _Problem, target: float, tolerance: float, most: int) -> list[_Best]:
    """Finds the number of parameters whose FLOPs meet the target, then looks at the shapes around it."""
    behind = 0
    if problem.split.get("fixed"):
        found = problem.count({})
        behind = found.dense_params - (found.encoder_params or 0)
    params = _params_in_front(problem, behind, target) if behind else _params_of_flops(problem, target, tolerance)

    def error(count: Count) -> float:
        return count.train_flops_per_row / target - 1.0

    within: list[_Best] = []
    nearest: list[_Best] = []
    for factor in _AROUND:
        around = behind + (params - behind) * factor
        found, _ = _scan(problem, around, error, tolerance, most - len(within))
        within += [shape for shape in found if abs(shape.error) <= tolerance and shape not in within]
        nearest = sorted([*nearest, *found], key=lambda shape: abs(shape.error))[:1]
        if len(within) >= most:
            break
    return within or nearest or _smallest(problem, params, error)


def _params_of_flops(problem: _Problem, target: float, tolerance: float) -> float:
    """Secant steps on FLOPs per parameter, which changes slowly with size."""
    params = target / _USUAL_FLOPS_PER_PARAM
    for _ in range(_ROUNDS):
        near = _nearest_params(problem, params, tolerance, 1)
        if not near:
            break
        count = problem.count(near[0].overrides)
        before, params = params, target * count.dense_params / count.train_flops_per_row
        if abs(params / before - 1.0) < _CONVERGED:
            break
    return params


def _params_in_front(problem: _Problem, behind: int, target: float) -> float:
    """Bisection on an encoder's parameters: of few of them a history makes any number of FLOPs."""

    def flops(own: float) -> int:
        near = _nearest_params(problem, behind + own, 0.0, 1)
        return problem.count(near[0].overrides).train_flops_per_row

    low, high = 1.0, 4.0
    while flops(high) < target and high < _MOST_PARAMS:
        low, high = high, 4.0 * high
    while high / low > 1.0 + _CONVERGED:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if flops(middle) < target else (low, middle)
    return behind + high


def _scan(
    problem: _Problem, params: float, error: Callable[[Count], float], tolerance: float, most: int
) -> tuple[list[_Best], Count | None]:
    """The first `most` proposals within tolerance, or the nearest; and the count of the very first (None: none)."""
    within: list[_Best] = []
    nearest, first = _Best(), None
    for overrides in models.size_space(problem.model, problem.schema, problem.base, params, **problem.split):
        count = problem.count(overrides)
        first = first or count
        shape = _Best(error(count), overrides)
        if abs(shape.error) < abs(nearest.error):
            nearest = shape
        if abs(shape.error) <= tolerance:
            within.append(shape)
        if len(within) == most:
            break
    return within or ([nearest] if first is not None else []), first


def _smallest(problem: _Problem, params: float, error: Callable[[Count], float]) -> list[_Best]:
    """Where nothing is proposed (the inputs alone need more): of the smallest shapes there are, the nearest."""
    best: list[_Best] = []
    low, high = params, params
    for _ in range(_DOUBLINGS):
        low, high = high, 2.0 * high
        best, first = _scan(problem, high, error, 0.0, 1)
        if first is not None:
            break
    else:
        return best
    while high / low > _SMALLEST_RATIO:
        middle = math.sqrt(low * high)
        found, first = _scan(problem, middle, error, 0.0, 1)
        if first is None:
            low = middle
        else:
            high, best = middle, sorted([*best, *found], key=lambda shape: abs(shape.error))[:1]
    return best


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
