"""Noise between repeated seeds: its standard deviation as a function of the metric."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

MIN_SEED_SIZES = 2


@dataclass(frozen=True)
class SeedNoise:
    """sd of the metric over repeated seeds, log-linear in the metric: ln sd = intercept + slope ln y."""

    intercept: float
    slope: float
    sizes: int
    repeats: int

    def sd(self, y: np.ndarray) -> np.ndarray:
        """Standard deviation at metric values y."""
        return np.exp(self.intercept + self.slope * np.log(np.abs(y)))


def seed_noise(frame: pd.DataFrame, same: list[str], y: np.ndarray) -> SeedNoise | None:
    """sd over rows that share the columns `same` and differ in `seed`; None without repeats at two or more
    sizes.
    """
    if "seed" not in frame.columns:
        return None
    point = np.unique(frame[same].to_numpy(float), axis=0, return_inverse=True)[1].ravel()
    pairs, code = np.unique(np.stack([point, pd.factorize(frame["seed"])[0]]), axis=1, return_inverse=True)
    per_seed = np.bincount(code.ravel(), y) / np.bincount(code.ravel())
    count = np.bincount(pairs[0])
    mean = np.bincount(pairs[0], per_seed) / count
    variance = np.bincount(pairs[0], (per_seed - mean[pairs[0]]) ** 2) / np.maximum(count - 1, 1)
    repeated = (count >= 2) & (variance > (1e-12 * mean) ** 2)  # above rounding
    count, mean, variance = count[repeated], mean[repeated], variance[repeated]
    if len(count) < MIN_SEED_SIZES:
        return None
    free = count - 1.0
    # E[ln s^2] = ln sigma^2 + digamma(f/2) - ln(f/2): removes the bias of averaging logs of variances.
    log_sd = 0.5 * (np.log(variance) - special.digamma(free / 2) + np.log(free / 2))
    log_y = np.log(np.abs(mean))
    slope = 0.0
    if np.ptp(log_y) > 0 and len(count) >= 3:
        slope = float(np.polyfit(log_y, log_sd, 1, w=np.sqrt(free))[0])
    intercept = float(np.average(log_sd - slope * log_y, weights=free))
    return SeedNoise(intercept, slope, len(count), int(count.sum()))
