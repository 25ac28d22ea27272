"""RankMixer and the MLP at the quickstart's seven sizes with 8e6 rows, three times the most of `mixers_by_rows`.

A table of its own: what `mixers_by_rows_check` was forecast from stays as it was. Rates of the three smallest shapes
are the best of three or four on another stream with as many rows (`mixers_by_rows_rates`). Those of the others are
the quickstart's times the powers of the rows of `mixers_by_rows`.

    recscale sweep mixers_by_rows_most --out runs/mixers_by_rows_most --no-report

What it says and what it does not: notebooks/runs/mixers.md.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, noted, product, quickstart, seeds
from recscale.sweeps.mixers.mixers_by_rows import RATE_EXPONENT, SEARCHED_ROWS, WARMUP

ROWS = 8_000_000
# Best of those tried with so many rows.
RATES = {
    "rankmixer": {"2.7e3": 1.9e-2, "6.4e3": 5.2e-3, "1.1e4": 4.2e-3},
    "dlrm_mlp": {"2.7e3": 4.4e-3, "6.4e3": 1.3e-2, "1.1e4": 1e-2},
}


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.training.examples = ROWS
    config.training.warmup_examples = WARMUP
    return config


def get_sweep() -> Sweep:
    """Two seeds of the three smallest sizes, one of the others."""
    return chain(*(product(_at(size), seeds(2 if size in RATES["rankmixer"] else 1)) for size in quickstart.LADDER))


def get_report() -> dict:
    return {"form": "power", "axes": {"N": "dense_params"}, "target": "excess_logloss"}


def _at(size: str) -> Sweep:
    searched = {"lr_rule": "best of three or four on another stream", "lr_bracketed": True}
    ruled = {"lr_rule": "best of three at 1.75e6 rows, times a power of the rows", "lr_bracketed": False}
    found = []
    for point in quickstart.shapes(size):
        name = point["architecture"]
        rate = RATES[name].get(size) or point["training.lr"] * (ROWS / SEARCHED_ROWS) ** -RATE_EXPONENT[name]
        notes = searched if size in RATES[name] else ruled
        found += noted([point | {"training.lr": float(f"{rate:.2g}")}], match_id=size, **notes)
    return found
