"""RankMixer and the MLP below and above the quickstart's sizes, with its 1.25e6 rows: more than two decades of sizes.

The large ones are the shapes of `mixers_by_rows_check`, and a RankMixer of twice that size. A RankMixer of eight
tokens has 2.3e3 parameters and more on this log, so that the small one has four: it is another shape, and no part of
a law of the others. The rate of each is the best of three or more on another stream of the log, found first.

    recscale sweep mixers_by_rows_beyond --out runs/mixers_by_rows_beyond --no-report

What it says and what it does not: notebooks/runs/mixers.md.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, noted, product, quickstart, seeds
from recscale.sweeps.mixers import mixers_by_rows_check

SMALLER = "1e3"
# Where the search begins.
SMALL = {
    "rankmixer": {"model.layers": 1, "model.tokens": 4, "model.width": 4, "model.hidden": 2, "training.lr": 2e-2},
    "dlrm_mlp": {"model.widths": (4,), "training.lr": 2e-2},
}
CENTRES = {"rankmixer": 1.8e-3, "dlrm_mlp": 2e-3}
LARGEST = "9.9e5"
LARGEST_MODEL = {"model.layers": 1, "model.tokens": 8, "model.width": 336, "model.hidden": 168, "training.lr": 2.4e-3}


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    """Five seeds of the small ones, whose seeds differ most, and one of the large ones."""
    small = noted([{"architecture": name, **model} for name, model in SMALL.items()], match_id=SMALLER)
    large = noted(mixers_by_rows_check.shapes(CENTRES), match_id=mixers_by_rows_check.SIZE)
    largest = noted([{"architecture": "rankmixer", **LARGEST_MODEL}], match_id=LARGEST)
    return chain(product(small, seeds(5)), product(large + largest, seeds(1)))


def get_rates() -> dict:
    return {"trials": quickstart.TRIALS}


def get_report() -> dict:
    return {"form": "power", "axes": {"N": "dense_params"}, "target": "excess_logloss"}
