"""Helpers of `size_space`: which shapes are hardware-friendly at a size, and solving widths for a target.

Below 1e7 parameters widths are tried in steps of 8, then 4, 2 and 1, since a step of 8 may already miss the target;
from 1e7 on they are multiples of 128 or 64, which matrix units prefer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .counts import Params
from .inputs.history import NO_TOKENS, TokenShape
from .inputs.schema import Schema
from .inputs.tokenizers import TokenizerOptions, plan_tokens, possible_tokens

LARGE = 1e7

# Widths tried for the layer that is held fixed, relative to the solution with equal widths.
_RATIOS = (0.25, 0.4, 0.6, 0.75, 0.85, 0.93, 1.0, 1.07, 1.15, 1.3, 1.6, 2.5)

# How far from the target a shape may be before all others are preferred; small models come in coarse steps.
_MISS = 0.25
# The same of an encoder's share of a size.
_NEAR = 0.1

Shape = tuple[int, ...]


def grains(target: float, large: Shape = (64,)) -> Shape:
    """Step sizes for a hidden width, friendliest first."""
    return large if target >= LARGE else (8, 4, 2, 1)


def solve_affine(params: Callable[[int], int], target: float, grain: int) -> int | None:
    """The multiple of `grain` where params(x), affine in x, is nearest to the target; None if that is below 1."""
    nearest = grain * round(solve_affine_exactly(params, target) / grain)
    return nearest if nearest >= 1 else None


def solve_affine_exactly(params: Callable[[int], int], target: float) -> float:
    """The x, whole or not, where params(x), affine in x, meets the target."""
    at_one = params(1)
    return (target - at_one) / (params(2) - at_one) + 1


def solve_increasing(params: Callable[[int], int], target: float, grain: int) -> int:
    """The multiple of `grain` where the increasing params(x) is nearest to the target."""
    high = 1
    while params(high * grain) < target:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if params(middle * grain) < target else (low, middle)
    if low == 0:
        return high * grain
    return min(low * grain, high * grain, key=lambda x: abs(params(x) - target))


def mlp_shapes(params: Callable[[Shape], int], layers: int, target: float) -> Iterator[Shape]:
    """Widths of an MLP near the target: all layers equal first, then a first layer that differs from the others.

    Letting the first layer differ gives shapes between those of equal widths, whose steps are several per cent.
    """
    if layers < 1:
        yield ()
        return
    params = functools.cache(params)  # steps ask for the same shapes
    for grain in grains(target, (128, 64)):
        equal = solve_increasing(lambda w: params((w,) * layers), target, grain)
        yield (equal,) * layers
        if layers == 1:
            continue
        shapes: set[Shape] = set()
        for fixed in {grain * max(1, round(equal * ratio / grain)) for ratio in _RATIOS}:
            shapes.update(_one_fixed(params, layers, target, grain, fixed))
        yield from sorted(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape))


def solve_widths(
    shapes: Iterable[tuple[dict[str, Any], str, float]],
    params: Callable[[dict[str, Any]], int],
    target: float,
    large: Shape = (64,),
    multiple: int = 1,
) -> Iterator[dict[str, Any]]:
    """Overrides whose params(overrides) are near the target, one width of each shape solved for.

    Args:
        shapes: (overrides, name of the width to solve for, what it should be), the preferred shapes first.
        large: steps of that width from 1e7 parameters on. multiple: it must be a multiple of this.

    Shapes come in the given order if the solved width is within a factor of 2 of what it should be, friendly steps
    first; the others follow, the least distorted first; last those that miss the target, the nearest first.
    """
    distorted: list[tuple[float, float, int, dict[str, Any]]] = []
    for fixed, free, ideal in shapes:
        at = functools.cache(lambda value, fixed=fixed, free=free: params(fixed | {free: value}))
        steps = [math.lcm(grain, multiple) for grain in grains(target, large)]
        for value in dict.fromkeys(solve_increasing(at, target, step) for step in steps):
            distortion = abs(math.log2(value / ideal))
            miss = abs(math.log(at(value) / target))
            miss = miss if miss > _MISS else 0.0
            if distortion <= 1 and not miss:
                yield fixed | {free: value}
            else:
                distorted.append((miss, distortion, len(distorted), fixed | {free: value}))
    for *_, overrides in sorted(distorted):
        yield overrides


def widths_around(ideal: float, target: float, multiple: int = 1, large: int = 128) -> list[int]:
    """Token widths D from a quarter to twice the ideal, nearest first: multiples of `large` from 1e7 parameters on,
    of 16 where that is at most a fifth of the ideal, else all."""
    step = large if target >= LARGE and ideal >= large else 16 if ideal >= 80 else 8 if ideal >= 24 else 1
    step = math.lcm(step, multiple)
    low, high = max(1, math.floor(ideal / 4 / step)), math.ceil(2 * ideal / step)
    found = [step * i for i in range(low, high + 1)]
    return sorted(found, key=lambda D: (abs(math.log2(D / ideal)), D))


def interpolate(target: float, points: Mapping[float, float]) -> float:
    """Geometric interpolation between known (parameters, width) pairs; the end values outside."""
    known = sorted(points)
    if target <= known[0] or target >= known[-1]:
        return points[known[0] if target <= known[0] else known[-1]]
    low, high = max(x for x in known if x <= target), min(x for x in known if x > target)
    share = math.log(target / low) / math.log(high / low)
    return points[low] * (points[high] / points[low]) ** share


def _one_fixed(params, layers: int, target: float, grain: int, fixed: int) -> Iterator[Shape]:
    """The first layer `fixed` and the others solved for, and the other way round."""
    others = solve_increasing(lambda w: params((fixed, *(w,) * (layers - 1))), target, grain)
    yield (fixed, *(others,) * (layers - 1))
    first = solve_affine(lambda w: params((w, *(fixed,) * (layers - 1))), target, grain)
    if first is not None:
        yield (first, *(fixed,) * (layers - 1))


def sized_by(
    sizes: Callable[[Any, int], dict[str, Any]],
    count_params: Callable[..., Params],
    multiple: Callable[[Any], int] = lambda config: 1,
) -> Callable[..., Iterator[dict[str, Any]]]:
    """The `size_space` of an encoder that grows with one width; friendly widths come first among those within a tenth.

    Args:
        sizes: (config, width) -> overrides of the config.
        multiple: what the width has to be a multiple of.
    """

    def size_space(schema: Schema, config: Any, target: float) -> Iterator[dict[str, Any]]:
        params = dense_params(count_params, config, schema)

        def miss(width: int) -> float:
            return abs(params(sizes(config, width)) / target - 1)

        steps = [math.lcm(grain, multiple(config)) for grain in grains(target)]
        widths = {solve_increasing(lambda n: params(sizes(config, n)), target, step): None for step in steps}
        for width in sorted(widths, key=lambda width: miss(width) if miss(width) > _NEAR else 0.0):
            yield sizes(config, width)

    return size_space


def dense_params(count_params: Callable[..., Params], config: Any, *given: Any) -> Callable[[dict[str, Any]], int]:
    """Dense parameters of a config with some overrides, `given` the schema and the tokens of a sequence encoder."""
    return lambda overrides: count_params(dataclasses.replace(config, **overrides), *given).dense


def mlp_widths(params: Callable[[dict[str, Any]], int], layers: int, target: float) -> Iterator[dict[str, Any]]:
    """Overrides (widths) near the target, of so many layers, as `mlp_shapes` has them."""
    for widths in mlp_shapes(lambda widths: params({"widths": widths}), layers, target):
        yield {"widths": widths}


def token_shapes(
    params: Callable[[dict[str, Any]], int],
    choices: Mapping[int, tuple[int | None, float]],
    target: float,
    ratio: float,
    unit: int = 1,
) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) of blocks with one network D -> F -> D per token; friendliest first.

    For each T and each D, a multiple of T and of 4 (128 from 1e7 parameters on), the hidden width F that meets the
    target is solved for. First come shapes with F/D near `ratio`, cheap choices of T, and coarse multiples for F.

    Args:
        params: dense parameters of the config with such overrides, affine in the hidden width.
        choices: T -> (what the config says, the cost in octaves of F/D that a better choice of T is worth).
        unit: F is a multiple of this.
    """
    found, ratio = [], ratio / unit

    def shape(T: int, D: int, F: int) -> dict[str, Any]:
        return {"tokens": choices[T][0], "width": D, "hidden": unit * F}

    for T, (_, cost) in choices.items():
        step = math.lcm(T, 128 if target >= LARGE else 4)
        ideal = step * solve_increasing(
            lambda n, T=T, step=step: params(shape(T, n * step, round(ratio * n * step))), target, 1
        )
        for D in range(step, 3 * ideal + step + 1, step):
            exact = solve_affine_exactly(lambda F, T=T, D=D: params(shape(T, D, F)), target)
            widths = dict.fromkeys(
                grain * round(exact / grain) for grain in grains(target) if exact >= grain / 2 + 1e-9
            )
            found += [(abs(math.log2(F / D / ratio)) + cost + i / 4, T, D, F) for i, F in enumerate(widths)]
    for _, *sizes in sorted(found):
        yield shape(*sizes)


def shapes_by_width(
    choices: Iterable[tuple[int | None, float]],
    target: float,
    layers: int,
    ratio: float,
    hiddens: Callable[[int | None, int], Iterable[tuple[int, int]]],
) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) of `layers` blocks with one network D -> F -> D per token; friendliest first.

    Args:
        choices: (T, its cost in octaves of F/D); T None stays as configured.
        ratio: F/D that is preferred.
        hiddens: (T, D) -> (rank, F) that meet the target, rank 0 the friendliest.
    """
    found = set()
    for T, token_cost in choices:
        step = math.lcm(T or 1, 128 if target >= LARGE else 4)
        ideal = math.sqrt(target / (2 * ratio * layers * (T or 16)))
        for D in range(step, int(3 * ideal) + step + 1, step):
            for rank, hidden in hiddens(T, D):
                found.add((abs(math.log2(hidden / D / ratio)) + token_cost + rank / 4, T or 0, D, hidden))
    for _, T, D, hidden in sorted(found):
        yield {"tokens": T or None, "width": D, "hidden": hidden}


def affine_widths(params: Callable[[int], int], target: float, unit: int = 1) -> list[int]:
    """Multiples of `unit` and of each grain, coarsest first, at which params, affine in the width, meets the target."""
    one, two = params(unit), params(2 * unit)
    exact = unit * (1 + (target - one) / (two - one))
    steps = [math.lcm(grain, unit) for grain in grains(target)]
    return list(dict.fromkeys(grain * round(exact / grain) for grain in steps if exact >= grain / 2 + 1e-9))


def token_choices(possible: Iterable[int], target: float) -> list[tuple[int, float]]:
    """Powers of two among the possible T, within an octave of the one that suits the size, with half an octave's cost
    per octave; whatever is possible if none is a power of two."""
    possible = list(possible)
    powers = [T for T in (2, 4, 8, 16, 32, 64) if T in possible] or possible[-1:]
    suits = 4 if target < 3e4 else 8 if target < 3e5 else 16 if target < 3e8 else 32
    nearest = min(powers, key=lambda T: (abs(math.log2(T / suits)), T))
    return [(T, abs(math.log2(T / nearest)) / 2) for T in powers if abs(math.log2(T / nearest)) <= 1]


def tokenizer_choices(
    schema: Schema, options: TokenizerOptions, target: float, tokens: TokenShape
) -> list[tuple[int | None, float]]:
    """T as configured, or those that suit the size where a "cut" tokenizer may choose; each with its cost."""
    if options.tokens is not None or options.tokenizer != "cut":
        return [(options.tokens, 0.0)]
    return list(token_choices(possible_tokens(schema, options, tokens), target))


def counted_choices(
    schema: Schema, config: Any, target: float, tokens: TokenShape = NO_TOKENS
) -> dict[int, tuple[int | None, float]]:
    """`tokenizer_choices` as `token_shapes` takes them; where no T is given, that of the config's tokenizer."""
    chosen = tokenizer_choices(schema, config, target, tokens)
    return {T or plan_tokens(schema, config, config.width, tokens).tokens: (T, cost) for T, cost in chosen}
