"""Helpers of `size_space`: which shapes are hardware-friendly at a size, and solving one width for a target.

Below 1e7 parameters shapes are tried in steps of 8, then 4, 2 and 1, since a step of 8 may already miss the target;
from 1e7 on widths are multiples of 128 and hidden widths of 64, which matrix units prefer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

LARGE = 1e7


def grains(target: float, large: int = 64) -> tuple[int, ...]:
    """Step sizes for a hidden width, friendliest first."""
    return (large,) if target >= LARGE else (8, 4, 2, 1)


def solve_affine(params: Callable[[int], int], target: float, grain: int) -> int | None:
    """The multiple of `grain` at which params(x), affine in x, is nearest to the target; None if that is below 1."""
    at_one = params(1)
    slope = params(2) - at_one
    x = (target - at_one) / slope + 1
    nearest = grain * round(x / grain)
    return nearest if nearest >= 1 else None


def solve_increasing(params: Callable[[int], int], target: float, grain: int) -> Iterator[int]:
    """The two multiples of `grain` around the point where the increasing params(x) meets the target, nearest first."""
    if params(grain) >= target:
        yield grain
        return
    low, high = 1, 2
    while params(high * grain) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if params(middle * grain) < target else (low, middle)
    yield from sorted((low * grain, high * grain), key=lambda x: abs(params(x) - target))
