"""Starting points: exponents on a grid, coefficients exactly by non-negative weighted least squares (variable
projection).

For fixed exponents a form is a sum of k known columns times coefficients. Relative residuals (columns / y
against 1) make the least-squares problem scale-free. Non-negativity is exact: all 2^k active sets are solved
as small normal systems and the best feasible one is kept.

Legend: n rows, d axes, g grid points, k linear terms, m exponents.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product

import numpy as np
from jaxtyping import Float

from recscale.scaling.laws.forms.form import EXPONENT_GRID, SOBOL_SEED, Linear, sobol

from .problem import Problem

_CHUNK_ELEMENTS = 2**21  # bounds the memory of a grid block to tens of megabytes


@cache
def exponent_grid(free: int) -> np.ndarray:
    """Exponent combinations [g, free] in [.03, 2.5]: 16 per exponent up to two, Sobol points beyond."""
    if free == 0:
        return np.zeros((1, 0))
    if free <= 2:
        return np.array(list(product(EXPONENT_GRID, repeat=free)))
    count = 10 if free < 5 else 11  # log2 of the number of points
    unit = sobol(free, count)
    low, high = np.log(EXPONENT_GRID[0]), np.log(EXPONENT_GRID[-1])
    return np.exp(low + unit * (high - low))


def _grid(linear: Linear) -> dict[str, np.ndarray]:
    """Every exponent's value at every grid point (name -> [g]); exponents with a grid of their own are
    crossed in.
    """
    common = [name for name in linear.exponents if name not in linear.grid]
    points = exponent_grid(len(common))
    own = list(product(*(linear.grid[name] for name in linear.exponents if name in linear.grid)))
    names = [name for name in linear.exponents if name in linear.grid]
    values = {name: np.repeat(points[:, j], len(own)) for j, name in enumerate(common)}
    values |= {name: np.tile([choice[j] for choice in own], len(points)) for j, name in enumerate(names)}
    return values


def _active_sets(terms: int, signed: tuple[bool, ...]) -> np.ndarray:
    """0/1 masks [sets, k] of which terms are in; signed terms always are."""
    masks = list(product((1.0, 0.0), repeat=terms))
    return np.array([mask for mask in masks if all(on or not free for on, free in zip(mask, signed, strict=True))])


def nonnegative(
    gram: Float[np.ndarray, "g k k"], moment: Float[np.ndarray, "g k"], signed: tuple[bool, ...]
) -> tuple[Float[np.ndarray, "g k"], Float[np.ndarray, " g"]]:
    """argmin_c c'Gc - 2 c'm with c >= 0 where not signed: G[g, k, k], m[g, k] -> (c[g, k], value[g])."""
    terms = gram.shape[-1]
    norm = np.sqrt(np.maximum(np.einsum("gkk->gk", gram), 1e-300))
    scaled = gram / (norm[:, :, None] * norm[:, None, :])
    target = moment / norm
    masks = _active_sets(terms, signed)
    eye = np.eye(terms)
    inside = masks[:, :, None] * masks[:, None, :]
    # The ridge keeps collinear columns (an exponent near 0 against the floor) solvable; starts need no more.
    systems = scaled[:, None] * inside[None] + eye * (1.0 - masks)[None, :, None, :] + 1e-12 * eye
    solved = np.linalg.solve(systems, (target[:, None, :] * masks[None])[..., None])[..., 0] * masks[None]
    feasible = np.all((solved >= 0) | np.array(signed), axis=-1)
    value = np.einsum("gsk,gkl,gsl->gs", solved, scaled, solved) - 2 * np.einsum("gsk,gk->gs", solved, target)
    value = np.where(feasible, value, np.inf)
    best = np.argmin(value, axis=1)
    rows = np.arange(len(best))
    return solved[rows, best] / norm, value[rows, best]


def project(
    linear: Linear, axes: np.ndarray, y: np.ndarray, weights: np.ndarray, relative: bool
) -> tuple[dict, np.ndarray]:
    """Best coefficients at every grid point: ({name: [g]} natural and centred, objective[g])."""
    exponents = linear.sampler(axes) if linear.sampler is not None else _grid(linear)
    count = len(next(iter(exponents.values()))) if exponents else 1
    kept = weights > 0
    axes, y, weights = axes[kept], y[kept], weights[kept]
    # In the log-linear case the columns describe ln y itself; otherwise residuals are relative where y > 0.
    target = np.log(y) if linear.of == "log" else y - linear.known
    divide = 1.0 / y if relative and linear.of == "target" else np.full(len(y), 1.0 / (np.std(target) or 1.0))
    block = max(1, _CHUNK_ELEMENTS // (len(y) * len(linear.coefficients)))
    solved, values = [], []
    for begin in range(0, count, block):
        part = {name: value[begin : begin + block, None] for name, value in exponents.items()}
        size = min(block, count - begin)
        columns = [np.broadcast_to(c, (size, len(y))) * divide for c in linear.columns(part, axes)]
        design = np.stack(columns, axis=-1)
        weighted = design * weights[:, None]
        gram = np.matmul(weighted.transpose(0, 2, 1), design)
        moment = np.einsum("gnk,n->gk", weighted, target * divide)
        coefficients, value = nonnegative(gram, moment, linear.signed)
        solved.append(coefficients)
        values.append(value + np.sum(weights * (target * divide) ** 2))
    coefficients = np.concatenate(solved)
    named = {**exponents, **{name: coefficients[:, j] for j, name in enumerate(linear.coefficients)}}
    return named, np.concatenate(values)


def _spread(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the best count/2 grid points and of count/2 spread evenly over the better half."""
    order = np.argsort(values, kind="stable")
    best = order[: count // 2]
    half = order[count // 2 : max(len(order) // 2, count // 2 + 1)]
    rest = half[np.linspace(0, len(half) - 1, count - len(best)).round().astype(int)] if len(half) else best
    return np.concatenate([best, rest])


def starting_points(problem: Problem, weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, "s p"]:
    """Search-space starts[s, p] of a problem: eight from the grid, times the form's extra starts."""
    form = problem.form
    if form.starts is not None:
        natural = form.starts(problem.axes, problem.y, np.random.default_rng(SOBOL_SEED))
        return form.to_search(natural)
    assert form.linear is not None, f"form {form.id} declares neither a linear part nor starts of its own"
    named, values = project(form.linear, problem.axes, problem.y, weights, problem.kind == "log")
    chosen = _spread(values, min(form.start_count, len(values)))
    natural = {name: value[chosen] for name, value in named.items()}
    # A term solved to zero restarts small but visible, so the refinement can bring it back.
    scale = float(np.median(np.abs(problem.y))) or 1.0
    for parameter in form.parameters:
        if parameter.scale == "target" and parameter.searched == "log" and parameter.name in natural:
            natural[parameter.name] = np.maximum(natural[parameter.name], 0.1 * scale)
    return form.to_search(_crossed(natural, form.extra_starts, len(chosen)))


def _crossed(natural: dict, extra: Mapping[str, tuple[float, ...]], count: int) -> dict:
    """Every start with every combination of the extra values."""
    choices = list(product(*extra.values()))
    crossed = {name: np.tile(value, len(choices)) for name, value in natural.items()}
    for j, name in enumerate(extra):
        crossed[name] = np.repeat([choice[j] for choice in choices], count)
    return crossed
