"""Groups of equal training compute of RankMixer and the MLP: which size is best for a budget, and how it grows.

Shapes and log of `mixers_by_rows`; the rows of a run are what its budget affords. Every rate is the best of three or
more on another stream of the log, found first, around the quickstart's times `mixers_by_rows`'s power of the rows. One
budget more, at rates by that rule alone: `mixers_by_rows_isoflop_largest`.

    recscale sweep mixers_by_rows_isoflop --out runs/mixers_by_rows_isoflop --no-report
    recscale isoflop runs/mixers_by_rows_isoflop --where "architecture == 'rankmixer'"

What it says and what it does not: notebooks/runs/mixers.md.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, by_flop_budget, chain, noted, product, quickstart, seeds
from recscale.sweeps.mixers.mixers_by_rows import RATE_EXPONENT, SEARCHED_ROWS, WARMUP

# Budget in training FLOPs: the smallest and the largest size of the quickstart in its group, seeds.
GROUPS = {1e10: ("2.7e3", "5.0e4", 2), 3e10: ("2.7e3", "8.6e4", 2), 1e11: ("6.4e3", "1.15e5", 2)}
# Training FLOPs of a row.
PER_ROW = {
    "rankmixer": dict(zip(quickstart.LADDER, (11056, 28256, 51600, 116720, 260480, 459536, 622960), strict=True)),
    "dlrm_mlp": dict(zip(quickstart.LADDER, (10978, 25948, 44910, 94810, 200598, 348302, 459080), strict=True)),
}


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    return chain(*(product(group(budget, *ends), seeds(count)) for budget, (*ends, count) in GROUPS.items()))


def get_rates() -> dict:
    return {"trials": quickstart.TRIALS}


def get_report() -> dict:
    return {"form": "kappa", "axes": {"N": "dense_params", "D": "examples"}}


def group(budget: float, first: str, last: str) -> Sweep:
    """Both architectures from one size to another with what the budget affords, at rates by the rule."""
    sizes, found = [*quickstart.LADDER], []
    for size in sizes[sizes.index(first) : sizes.index(last) + 1]:
        for point in quickstart.shapes(size):
            rows = budget / PER_ROW[point["architecture"]][size]
            rate = point["training.lr"] * (rows / SEARCHED_ROWS) ** -RATE_EXPONENT[point["architecture"]]
            warmup = {"training.warmup_examples": min(WARMUP, round(rows / 20))}
            found += noted([point | warmup | {"training.lr": float(f"{rate:.2g}")}], match_id=size)
    return product(by_flop_budget([budget]), found)
