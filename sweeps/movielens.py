"""MovieLens-100K, one pass: two architectures at two sizes. It shows the path of real data, not a law - 80,000 rows
carry no exponent, and the report says so.

    recscale data movielens-100k --out DIR
    recscale sweep movielens --data DIR --out runs/movielens

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, architectures, by_dense_params, product
from recscale.sweeps.base import power_law


def get_config(architecture: str = "rankmixer") -> ConfigDict:
    config = base_config(architecture, "stored")
    config.training.requests = 256
    config.training.passes = 0  # one pass in the log's order, every row of it
    config.data.order = "time"
    config.training.warmup_examples = None
    return config


def get_sweep() -> Sweep:
    return product(architectures(["rankmixer", "dcnv2"]), by_dense_params([1e4, 1e5]))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
