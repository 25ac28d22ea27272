"""Refits to resampled data: whole clusters drawn again, metrics redrawn with seed noise, one cluster left out.

Every method is a batch of refits of one compiled program: clusters are resampled as integer row weights, metrics are
redrawn as other targets, leaving a cluster out gives it weight 0.

Legend: b draws, n rows, p parameters, c clusters.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from recscale.scaling.laws.fitting.problem import Problem
from recscale.scaling.laws.fitting.solver import WARM, Solution, refine

from .seed_noise import SeedNoise


def cluster_counts(clusters: int, draws: int, generator: np.random.Generator) -> Int[np.ndarray, "b c"]:
    """How often each of c clusters is drawn in b resamples of c with replacement: integers [b, c]."""
    return generator.multinomial(clusters, np.full(clusters, 1.0 / clusters), size=draws)


def bootstrap(
    problem: Problem,
    solution: Solution,
    codes: Int[np.ndarray, " n"],
    draws: int,
    seed: int,
    *,
    counts: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    restart: bool = True,
) -> Float[np.ndarray, "b p"]:
    """phi[b, p] of refits on resampled clusters, each the better of a warm start and (with `restart`) one
    random restart.

    codes[n]: cluster of each row. counts[b, c]: resamples drawn elsewhere, so that two fits can share them
    (paired comparison).
    """
    generator = np.random.default_rng(seed)
    if counts is None:
        counts = cluster_counts(int(codes.max()) + 1, draws, generator)
    base = problem.weights if weights is None else weights
    resampled = counts[:, codes] * base
    if not restart:
        starts = np.broadcast_to(solution.phi, (len(resampled), len(solution.phi)))
        return refine(problem, starts, weights=resampled, control=WARM).phi
    return _better_of_two(problem, solution, generator, weights=resampled)


def _better_of_two(problem: Problem, solution: Solution, generator: np.random.Generator, **changes) -> np.ndarray:
    """Refits from the optimum and from a random one of the refined or perturbed starts; the lower objective
    wins.
    """
    count = len(next(iter(changes.values())))
    warm = np.broadcast_to(solution.phi, (count, len(solution.phi)))
    ends = solution.starts.phi[generator.integers(len(solution.starts.phi), size=count)]
    restart = ends + 0.3 * generator.standard_normal(ends.shape)
    first = refine(problem, warm, control=WARM, **changes)
    second = refine(problem, restart, control=WARM, **changes)
    keep = np.where(np.isfinite(second.objective), second.objective, np.inf) < first.objective
    return np.where(keep[:, None], second.phi, first.phi)


def seed_bootstrap(
    problem: Problem, solution: Solution, noise: SeedNoise, draws: int, seed: int
) -> Float[np.ndarray, "b p"]:
    """phi[b, p] of refits to metrics redrawn around the fitted law with the sd of repeated seeds."""
    generator = np.random.default_rng(seed)
    fitted = problem.form.value(solution.phi, problem.axes)
    redrawn = fitted + noise.sd(fitted) * generator.standard_normal((draws, len(fitted)))
    if problem.kind == "log":
        redrawn = np.log(np.maximum(redrawn, 1e-3 * fitted))
    return _better_of_two(problem, solution, generator, targets=redrawn)


def jackknife(problem: Problem, solution: Solution, codes: Int[np.ndarray, " n"]) -> Float[np.ndarray, "c p"]:
    """phi[c, p] of refits that leave one cluster out."""
    count = int(codes.max()) + 1
    weights = problem.weights * (codes[None, :] != np.arange(count)[:, None])
    starts = np.broadcast_to(solution.phi, (count, len(solution.phi)))
    return refine(problem, starts, weights=weights, control=WARM).phi
