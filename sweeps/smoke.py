"""The whole path of a sweep in under a minute: two architectures, three sizes, few rows. Its losses mean nothing.

recscale sweep smoke --out runs/smoke
"""

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, architectures, by_dense_params, product


def get_config() -> ConfigDict:
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 4_096
    config.training.requests = 256
    config.training.examples = 25_600
    config.training.warmup_examples = 2_560
    return config


def get_sweep() -> Sweep:
    # Sizes a model can have on this preset: projecting its inputs alone takes some thousand parameters.
    return product(architectures(["rankmixer", "dlrm_mlp"]), by_dense_params([1e4, 3e4, 1e5]))


def get_report() -> dict:
    # Too few sizes to leave one out.
    return {"form": "power_offset", "axes": {"N": "dense_params"}, "target": "logloss", "hold_out_largest": False}
