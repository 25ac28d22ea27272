"""Minimise sum_i w_i rho(r_i) over a form's parameters: grid by variable projection, then many damped
Gauss-Newton runs.

Residual r_i = ln yhat_i - ln y_i for positive metrics, (yhat_i - y_i) / unit_i otherwise. rho is Huber's
(r^2/2 up to delta, delta (|r| - delta/2) beyond), always summed and never averaged, or the Student-t
deviance.

Stage 1 (host, NumPy): exponents on a grid, the non-negative weighted least-squares coefficients of each point
exactly. Stage 2 (JAX, float64 on the CPU backend inside a scoped `jax.enable_x64`): all starts at once under
`vmap`, weights min(1, delta/|r|) that majorise Huber, damping scaled by the diagonal, then the same loop with
the second derivative of Huber itself, which converges to the last digits. Bootstrap draws, profile points and
jackknife fits are further rows of the same batch, so one program per (family, padded rows) serves
everything.

Legend: n rows (padded with weight 0), d axes, P family parameters, b batch entries, g grid
points, k terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from .problem import Problem
from .starts import starting_points

VERSION = "1"
# Of every compiled program. A batch takes as long as its slowest refinement: batches of 100 are no faster, of 770 rows
# slower, and a program of their own takes longer to compile than a thousand refits.
BATCH = 8
MAX_ITERATIONS = 400
# A start counts as converged when its objective is within this of the best one.
SHARE_RELATIVE, SHARE_ABSOLUTE = 1e-4, 1e-14


@dataclass(frozen=True)
class Batch:
    """Results of b refinements: phi[b, p], objective[b], iterations[b], gradient norm[b] (inf-norm over free
    parameters).
    """

    phi: Float[np.ndarray, "b p"]
    objective: Float[np.ndarray, " b"]
    iterations: Int[np.ndarray, " b"]
    gradient: Float[np.ndarray, " b"]


@dataclass(frozen=True)
class Solution:
    """Best of the starts, with everything needed to judge it. `starts` are all refined ends, best first."""

    phi: Float[np.ndarray, " p"]
    objective: float
    iterations: int
    gradient: float
    convergence_share: float
    starts: Batch = field(repr=False)


def _padded(n: int) -> int:
    """The next power of two, at least 16, so tables of similar size share one compiled program; of large tables, whose
    refits take longer than the program's compilation, the next quarter of one.
    """
    power = max(16, 1 << (n - 1).bit_length())
    return power if n <= 512 else -(-n // (power // 8)) * (power // 8)


def _solve_spd(matrix: jnp.ndarray, rhs: jnp.ndarray) -> jnp.ndarray:
    """Solve M x = v for symmetric positive definite M[P, P] by a Gauss-Jordan sweep (no pivoting needed)."""
    size = rhs.shape[0]
    full = jnp.concatenate([matrix, rhs[:, None]], axis=1)

    def sweep(j, work):
        row = work[j] / work[j, j]
        work = work - work[:, j][:, None] * row[None, :]
        return work.at[j].set(row)

    return jax.lax.fori_loop(0, size, sweep, full)[:, size]


class Control(NamedTuple):
    """When a refinement stops: `calm` accepted steps in a row below `tolerance`, or damping above `stuck`, or
    `limit` steps. The compiled program takes it as traced scalars, so changing a tolerance compiles nothing.
    """

    limit: int = MAX_ITERATIONS
    tolerance: float = 1e-12
    calm: int = 5
    stuck: float = 1e6
    polish: bool = True
    damping: float = 1e-2


class _State(NamedTuple):
    """One refinement in flight."""

    phi: jax.Array
    value: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    damping: jax.Array
    calm: jax.Array
    iteration: jax.Array
    exact: jax.Array
    done: jax.Array


@cache
def _program(family, kind: str):
    """The compiled refinement of one family: see `refine` for the arguments."""

    def residuals(phi, axes, target, weights, unit, matrix, constant):
        fitted = family.value(matrix @ phi + constant, axes, jnp)
        # Rows of weight 0 (padding, left-out clusters) must not poison the derivative.
        fitted = jnp.where(weights > 0, fitted, 1.0)
        residual = jnp.log(fitted) - target if kind == "log" else (fitted - target) / unit
        return jnp.where(weights > 0, residual, 0.0)

    def deviance(residual, delta, nu, scale):
        absolute = jnp.abs(residual)
        return jax.lax.cond(
            nu > 0,
            lambda: 0.5 * (nu + 1.0) * scale**2 * jnp.log1p((residual / scale) ** 2 / nu),
            lambda: jnp.where(absolute <= delta, 0.5 * residual**2, delta * (absolute - 0.5 * delta)),
        )

    def curvature(residual, delta, nu, scale, exact):
        absolute = jnp.abs(residual)

        def huber():
            soft = jnp.minimum(1.0, delta / jnp.maximum(absolute, 1e-300))
            return soft, jnp.where(exact, jnp.where(absolute <= delta, 1.0, 0.0), soft)

        def student():
            soft = (nu + 1.0) / (nu + (residual / scale) ** 2)
            return soft, soft

        return jax.lax.cond(nu > 0, student, huber)

    def one(phi, free, weights, target, scale, axes, unit, delta, matrix, constant, low, high, pull, nu, control):
        def function(point):
            residual = residuals(point, axes, target, weights, unit, matrix, constant)
            return residual, residual

        def advance(state):
            diagonal = jnp.diagonal(state.hessian)
            largest = jnp.max(diagonal)
            ridge = state.damping * diagonal + 1e-14 * largest + 1e-300 + (1.0 - free) * (largest + 1.0)
            # One unit is a factor e in a positive parameter; bounds apply to free entries only.
            move = jnp.clip(jnp.nan_to_num(_solve_spd(state.hessian + jnp.diag(ridge), -state.gradient)), -1.0, 1.0)
            trial = jnp.where(free > 0, jnp.clip(state.phi + move, low, high), state.phi)

            jacobian, residual = jax.jacfwd(function, has_aux=True)(trial)
            jacobian = jacobian * free[None, :]
            believed = jnp.where(pull[2] > 0, jnp.exp(trial), trial) - pull[1]
            rate = jnp.where(pull[2] > 0, jnp.exp(trial), 1.0) * free
            value = jnp.sum(weights * deviance(residual, delta, nu, scale)) + 0.5 * jnp.sum(pull[0] * believed**2)
            slope, bend = curvature(residual, delta, nu, scale, state.exact)
            gradient = (weights * slope * residual) @ jacobian + pull[0] * believed * rate
            hessian = (jacobian * (weights * bend)[:, None]).T @ jacobian + jnp.diag(pull[0] * rate**2)

            better = value < state.value
            gain = jnp.where(better, (state.value - value) / jnp.maximum(state.value, 1e-300), 1.0)
            calm = jnp.where(better & (gain < control.tolerance), state.calm + 1, jnp.where(better, 0, state.calm))
            settled = (calm >= control.calm) | (~better & (state.damping > control.stuck))
            # First settle on the majoriser, then once more on Huber's own second derivative.
            promote = settled & ~state.exact & control.polish
            damping = jnp.where(better, jnp.maximum(state.damping * 0.3, 1e-12), state.damping * 4.0)
            return _State(
                jnp.where(better, trial, state.phi),
                jnp.where(better, value, state.value),
                jnp.where(better, gradient, state.gradient),
                jnp.where(better, hessian, state.hessian),
                jnp.where(promote, 1e-4, damping),
                jnp.where(promote, 0, calm),
                state.iteration + 1,
                state.exact | promote,
                settled & ~promote,
            )

        # With an infinite value and no gradient the first step evaluates the start itself.
        square = jnp.zeros((phi.shape[0], phi.shape[0]))
        no, zero = jnp.asarray(False), jnp.asarray(0)
        start = _State(
            phi,
            jnp.asarray(jnp.inf),
            jnp.zeros_like(phi),
            square,
            jnp.asarray(control.damping),
            zero,
            zero,
            no,
            no,
        )
        state = jax.lax.while_loop(lambda s: ~s.done & (s.iteration < control.limit), advance, start)
        return state.phi, state.value, state.iteration, jnp.max(jnp.abs(state.gradient))

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, 0) + (None,) * 10))


# Resampled fits start at the optimum of the full table and need percentiles, not the last digit.
WARM = Control(limit=60, tolerance=1e-7, calm=2, stuck=1e2, polish=False, damping=1e-3)


def refine(
    problem: Problem,
    starts: Float[np.ndarray, "b p"],
    *,
    weights: np.ndarray | None = None,
    targets: np.ndarray | None = None,
    free: np.ndarray | None = None,
    nu: float = 0.0,
    scale: np.ndarray | float = 1.0,
    control: Control = Control(),  # noqa: B008  cannot change
) -> Batch:
    """Refine starts[b, p] (search space). Every per-entry argument may be left out or given for all entries
    at once.

    weights[n] or [b, n]: replace the problem's own (integer bootstrap multiplicities times them, zeros leave
    rows out). targets[n] or [b, n]: replace `problem.target` (redrawn metrics). free[p] or [b, p]: 0 keeps a
    parameter at its start, outside bounds if need be. nu > 0: Student-t deviance with `nu` degrees of freedom
    and residual `scale`[b] instead of Huber; large nu is Gaussian.
    """
    count, p = starts.shape
    n, size = len(problem.y), len(problem.form.family.names)
    rows = _padded(n)
    matrix, constant = problem.form.affine()

    def pad(array, width):
        padded = np.zeros((count, width))
        padded[:, : np.shape(array)[-1]] = array
        return padded

    phi = pad(starts, size)
    free = pad(np.ones(p) if free is None else free, size)
    weights = pad(problem.weights if weights is None else weights, rows)
    targets = pad(problem.target if targets is None else targets, rows)
    scale = np.broadcast_to(np.asarray(scale, float), (count,))
    shared_rows = [
        np.pad(problem.axes, ((0, rows - n), (0, 0))),
        *(np.pad(array, (0, rows - n), constant_values=1.0) for array in (problem.unit, problem.delta)),
    ]
    low, high, pull = (
        np.pad(e, [(0, 0)] * (e.ndim - 1) + [(0, size - p)]) for e in (problem.low, problem.high, problem.pull)
    )
    start_inside = np.where(free > 0, np.clip(phi, low, high), phi)

    program = _program(problem.form.family, problem.kind)
    pieces = []
    with jax.enable_x64(True), jax.default_device(cpu_device()):
        # NumPy arrays as they are: to make them JAX's one by one takes longer than many a refinement.
        shared = (*shared_rows, matrix, constant, low, high, pull, np.float64(nu))
        switches = Control._make(np.asarray(value) for value in control)
        for begin in range(0, count, BATCH):
            index = np.minimum(np.arange(begin, begin + BATCH), count - 1)
            entries = [array[index] for array in (start_inside, free, weights, targets, scale)]
            out = program(*entries, *shared, switches)
            pieces.append([np.asarray(o)[: count - begin] for o in out])
    phi, value, iterations, gradient = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return Batch(phi[:, :p], value, iterations, gradient)


def cpu_device():
    """The CPU device every fit runs on, whatever the default backend is."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise RuntimeError(
            "law fits run in float64 on JAX's CPU backend, which this process has switched off; "
            "add 'cpu' to JAX_PLATFORMS (for example JAX_PLATFORMS=cuda,cpu)"
        ) from error


def solve(problem: Problem, weights: np.ndarray | None = None, control: Control = Control()) -> Solution:  # noqa: B008
    """Best fit of a problem from the form's own starts, with its convergence share."""
    weights = problem.weights if weights is None else np.asarray(weights, float)
    starts = starting_points(problem, weights)
    batch = refine(problem, starts, weights=weights, control=control)
    value = np.where(np.isfinite(batch.objective), batch.objective, np.inf)
    order = np.argsort(value, kind="stable")
    best = value[order[0]]
    close = value <= best * (1 + SHARE_RELATIVE) + SHARE_ABSOLUTE * np.count_nonzero(weights)
    ordered = Batch(batch.phi[order], batch.objective[order], batch.iterations[order], batch.gradient[order])
    top = order[0]
    return Solution(
        batch.phi[top],
        float(best),
        int(batch.iterations[top]),
        float(batch.gradient[top]),
        float(np.mean(close)),
        ordered,
    )
