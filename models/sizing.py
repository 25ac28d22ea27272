"""Helpers of `size_space`: which shapes are hardware-friendly at a size, and solving widths for a target.

Below 1e7 parameters widths are tried in steps of 8, then 4, 2 and 1, since a step of 8 may already miss the target;
from 1e7 on they are multiples of 128 or 64, which matrix units prefer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

LARGE = 1e7

# Widths tried for the layer that is held fixed, relative to the solution with equal widths.
_RATIOS = (0.25, 0.4, 0.6, 0.75, 0.85, 0.93, 1.0, 1.07, 1.15, 1.3, 1.6, 2.5)

Shape = tuple[int, ...]


def grains(target: float, large: Shape = (64,)) -> Shape:
    """Step sizes for a hidden width, friendliest first."""
    return large if target >= LARGE else (8, 4, 2, 1)


def solve_affine(params: Callable[[int], int], target: float, grain: int) -> int | None:
    """The multiple of `grain` where params(x), affine in x, is nearest to the target; None if that is below 1."""
    at_one = params(1)
    x = (target - at_one) / (params(2) - at_one) + 1
    nearest = grain * round(x / grain)
    return nearest if nearest >= 1 else None


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
    for grain in grains(target, (128, 64)):
        equal = solve_increasing(lambda w: params((w,) * layers), target, grain)
        yield (equal,) * layers
        if layers == 1:
            continue
        shapes: set[Shape] = set()
        for fixed in sorted({grain * max(1, round(equal * ratio / grain)) for ratio in _RATIOS}):
            shapes.update(_one_fixed(params, layers, target, grain, fixed))
        yield from sorted(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape))


def _one_fixed(params, layers: int, target: float, grain: int, fixed: int) -> Iterator[Shape]:
    """The first layer `fixed` and the others solved for, and the other way round."""
    others = solve_increasing(lambda w: params((fixed, *(w,) * (layers - 1))), target, grain)
    yield (fixed, *(others,) * (layers - 1))
    first = solve_affine(lambda w: params((w, *(fixed,) * (layers - 1))), target, grain)
    if first is not None:
        yield (first, *(fixed,) * (layers - 1))
