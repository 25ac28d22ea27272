"""The whole path of a sweep in under a minute: two architectures, three sizes, few rows. Its losses mean nothing.

recscale sweep smoke --out runs/smoke
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, by_dense_params, product
from recscale.sweeps.base import known_truth, power_law


def get_config() -> ConfigDict:
    config = known_truth("rankmixer", "smoke", requests=256, examples=25_600, warmup_examples=2_560)
    config.data.holdout_rows = 4_096
    return config


def get_sweep() -> Sweep:
    # Sizes a model can have on this preset: projecting its inputs alone takes some thousand parameters.
    return product(architectures(["rankmixer", "dlrm_mlp"]), by_dense_params([1e4, 3e4, 1e5]))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
