"""Tables of runs drawn from laws that are known, and from no law at all: what the fitter's refusals and intervals are
measured on.

Noise is in shares of the excess above the floor: a run's own, and one that all runs of a shape share. Constants are
drawn anew for every study, so that nothing is tuned to one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

SMALLEST_SIZE, SMALLEST_DATA = 1e4, 1e5
AMOUNT_DECADES = 2.4


@dataclass(frozen=True)
class Cell:
    """One kind of study. form: what is fitted; law: what the rows obey, a key of `LAWS` or `NULLS`.

    sizes over `decades`, each run with `seeds` seeds; amounts of data for two axes. noise, shape: of the excess, per
    run and per shape. defect: "", or a key of `DEFECTS`.
    """

    form: str
    law: str
    sizes: int = 7
    decades: float = 1.8
    seeds: int = 3
    noise: float = 0.004
    shape: float = 0.0
    amounts: int = 1
    defect: str = ""

    @property
    def null(self) -> bool:
        return self.law in NULLS

    @property
    def name(self) -> str:
        grid = f"{self.sizes} x {self.amounts}" if self.amounts > 1 else f"{self.sizes}"
        parts = [self.form, self.law if self.law != self.form else "", f"{grid} sizes", f"{self.decades:g} decades"]
        parts += [f"{self.seeds} seeds", f"noise {self.noise:.2%}", f"shape {self.shape:.0%}" if self.shape else ""]
        return ", ".join(part for part in [*parts, self.defect] if part)


def _power_offset(u: np.ndarray, v: np.ndarray, draw: np.random.Generator) -> tuple[dict[str, float], np.ndarray]:
    truth = {"E": draw.uniform(0.3, 0.6), "alpha": draw.uniform(0.25, 0.5)}
    return truth, draw.uniform(0.03, 0.12) * np.exp(-truth["alpha"] * u)


def _power(u: np.ndarray, v: np.ndarray, draw: np.random.Generator) -> tuple[dict[str, float], np.ndarray]:
    truth = {"alpha": draw.uniform(0.1, 0.5)}
    return {"E": 0.0, **truth}, draw.uniform(0.3, 1.0) * np.exp(-truth["alpha"] * u)


def _two_terms(u: np.ndarray, v: np.ndarray, draw: np.random.Generator, kappa: float) -> tuple[dict, np.ndarray]:
    truth = {"E": draw.uniform(0.3, 0.6), "alpha": draw.uniform(0.25, 0.5), "beta": draw.uniform(0.25, 0.5)}
    # Equal contributions in the middle of the grid, where neither resource alone is short.
    middle = draw.uniform(0.01, 0.04)
    first = middle * np.exp(-truth["alpha"] * (u - u.mean()))
    second = middle * np.exp(-truth["beta"] * (v - v.mean()))
    return {**truth, "kappa": kappa}, (first**kappa + second**kappa) ** (1 / kappa)


# Name -> function of u = ln(size / smallest), v = ln(data / smallest) and a generator: constants, excess over E.
LAWS: dict[str, Callable] = {
    "power": _power,
    "power_offset": _power_offset,
    "chinchilla": lambda u, v, draw: _two_terms(u, v, draw, 1.0),
    "kappa": lambda u, v, draw: _two_terms(u, v, draw, 4.0),
}


def _logistic(u: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(4.0 * (u - u.mean()) / max(np.ptp(u) / 4, 1e-9)))


# Name -> share of an excess of .05 over .43 as a function of u and v in e-folds: rows that obey no power law.
NULLS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "constant": lambda u, v: np.ones_like(u),
    "log-linear": lambda u, v: 1.3 - 0.5 * u / np.ptp(u) - (0.5 * v / np.ptp(v) if np.ptp(v) else 0.0),
    "step": lambda u, v: 0.5 + 0.5 * (u < np.median(u)) + 0.5 * (v < np.median(v)),
    "saturating": lambda u, v: 0.3 + _logistic(u) + (_logistic(v) if np.ptp(v) else 0.0),
}

# Name -> (cell, excess of every run, generator) -> excess with the defect.
DEFECTS: dict[str, Callable[[Cell, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    # Noise of a run falls, or grows, ninefold along the sizes.
    "noisy small sizes": lambda cell, clean, code, draw: (
        clean * (1 + cell.noise * np.geomspace(3, 1 / 3, cell.sizes)[code] * draw.standard_normal(len(clean)))
    ),
    "noisy large sizes": lambda cell, clean, code, draw: (
        clean * (1 + cell.noise * np.geomspace(1 / 3, 3, cell.sizes)[code] * draw.standard_normal(len(clean)))
    ),
    "an outlier": lambda cell, clean, code, draw: (
        clean
        * (
            1
            + cell.noise
            * (draw.standard_normal(len(clean)) + 12 * (np.arange(len(clean)) == draw.integers(len(clean))))
        )
    ),
    "an unconverged size": lambda cell, clean, code, draw: (
        clean * (1 + cell.noise * (draw.standard_normal(len(clean)) + 6 * (code == cell.sizes - 1)))
    ),
}


def study(cell: Cell, seed: int) -> tuple[pd.DataFrame, dict[str, float]]:
    """One table of runs and the constants behind it (empty for a cell without a law)."""
    draw = np.random.default_rng([seed, *(ord(letter) for letter in cell.name)])
    size = np.linspace(0, cell.decades, cell.sizes) * np.log(10)
    amount = np.linspace(0, AMOUNT_DECADES, cell.amounts) * np.log(10) if cell.amounts > 1 else np.zeros(1)
    code, other, run = (axis.ravel() for axis in np.indices((cell.sizes, cell.amounts, cell.seeds)))
    u, v = size[code], amount[other]
    if cell.null:
        truth, floor, clean = {}, 0.43, 0.05 * NULLS[cell.law](u, v)
    else:
        truth, clean = LAWS[cell.law](u, v, draw)
        floor = truth["E"]
    shaped = clean * (1 + cell.shape * draw.standard_normal(cell.sizes)[code])
    if cell.defect:
        excess = DEFECTS[cell.defect](cell, shaped, code, draw)
    else:
        excess = shaped * (1 + cell.noise * draw.standard_normal(len(clean)))
    columns = {"shape_id": [f"size {k}" for k in code], "dense_params": SMALLEST_SIZE * np.exp(u), "seed": run}
    if cell.amounts > 1:
        columns["examples"] = SMALLEST_DATA * np.exp(v)
    return pd.DataFrame({**columns, "logloss": floor + excess}), truth


def design(reduced: bool = True) -> list[Cell]:
    """Cells of the simulation; the reduced design is what a nightly run can afford, the small one what a test can."""
    one = Cell("power_offset", "power_offset")
    two = Cell("chinchilla", "chinchilla", sizes=7, amounts=5, seeds=1)
    noises = (0.001, 0.004, 0.016, 0.064)
    cells = [replace(one, noise=noise) for noise in noises]
    cells += [replace(two, noise=noise) for noise in (0.004, 0.064)]
    cells += [replace(one, law=null, noise=0.064, sizes=9) for null in NULLS]
    if not reduced:
        return cells
    cells += [replace(one, noise=noise, shape=0.01) for noise in noises]
    cells += [replace(one, sizes=sizes, seeds=seeds) for sizes, seeds in ((7, 1), (9, 1), (9, 5), (14, 1), (5, 3))]
    cells += [replace(one, sizes=9, decades=decades, noise=0.016, shape=0.01) for decades in (1.2, 1.5, 1.8, 2.4, 3.0)]
    cells += [replace(one, sizes=sizes, noise=0.016, defect=defect) for sizes in (7, 14) for defect in DEFECTS]
    cells += [replace(one, sizes=7, noise=0.0, decades=decades) for decades in (1.8, 3.0)]
    cells += [replace(one, form="power", law="power", noise=noise, seeds=1) for noise in noises]
    cells += [replace(two, noise=noise) for noise in (0.001, 0.016)]
    cells += [replace(two, noise=0.004, shape=0.01), replace(two, sizes=8, amounts=8, noise=0.016, shape=0.01)]
    cells += [replace(two, form="kappa", law="kappa", sizes=8, amounts=8, noise=noise) for noise in (0.004, 0.016)]
    for null in NULLS:
        cells += [replace(one, law=null, noise=noise, sizes=sizes) for noise, sizes in ((0.016, 8), (0.004, 14))]
        cells.append(replace(one, form="power", law=null, noise=0.064, sizes=8, seeds=2))
        cells.append(replace(two, law=null, noise=0.016))
    return list(dict.fromkeys(cells))
