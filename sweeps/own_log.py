"""RankMixer against DCNv2 at five sizes on an imported log: passes until validation stops improving, three seeds.

    recscale data import shop.toml --out shop
    recscale sweep own_log --data shop --out runs/shop

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, architectures, by_dense_params, product, seeds
from recscale.sweeps.base import power_law

SIZES = [2e3, 5e3, 1.2e4, 3e4, 8e4]


def get_config() -> ConfigDict:
    return base_config("rankmixer", "stored")


def get_sweep() -> Sweep:
    return product(architectures(["rankmixer", "dcnv2"]), by_dense_params(SIZES), seeds(3))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
