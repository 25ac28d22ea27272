"""Standard deviations of parameters from the curvature of the objective at its minimum: independent rows, and clusters.

Legend: n rows, p parameters.
"""

from __future__ import annotations

import numpy as np

from recscale.scaling.laws.fitting.problem import Problem, residuals


def jacobian(problem: Problem, phi: np.ndarray) -> np.ndarray:
    """d residual / d phi [n, p] times the root of the weights, by central differences."""
    step = 1e-5
    columns = []
    for k in range(len(phi)):
        move = np.zeros(len(phi))
        move[k] = step
        columns.append((residuals(problem, phi + move) - residuals(problem, phi - move)) / (2 * step))
    return np.stack(columns, axis=1) * np.sqrt(problem.weights)[:, None]


def curvature_sd(problem: Problem, phi: np.ndarray) -> np.ndarray:
    """Standard deviations [p] from (J'J)^-1 times the residual variance at phi: independent rows of equal
    noise.
    """
    j = jacobian(problem, phi)
    r = residuals(problem, phi) * np.sqrt(problem.weights)
    variance = np.sum(r**2) / max(len(r) - len(phi), 1)
    return np.sqrt(np.maximum(np.diag(np.linalg.pinv(j.T @ j, rcond=1e-13)) * variance, 0.0))


def cluster_sd(problem: Problem, phi: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Standard deviations [p] at a least-squares fit that allow any correlation inside clusters.

    Sandwich (J'J)^-1 [sum_c (J_c'r_c)(J_c'r_c)'] (J'J)^-1 times C/(C-1) (n-1)/(n-p).
    """
    j = jacobian(problem, phi)
    r = residuals(problem, phi) * np.sqrt(problem.weights)
    n, p = j.shape
    count = int(codes.max()) + 1
    scores = np.zeros((count, p))
    np.add.at(scores, codes, j * r[:, None])
    bread = np.linalg.pinv(j.T @ j, rcond=1e-13)
    factor = count / max(count - 1, 1) * (n - 1) / max(n - p, 1)
    return np.sqrt(np.maximum(np.diag(bread @ (scores.T @ scores) @ bread) * factor, 0.0))
