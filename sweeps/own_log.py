"""RankMixer against DCNv2 at five sizes on an imported log: passes until validation stops improving, three seeds.

    recscale data import shop.toml --out shop
    recscale sweep own_log --data shop --out runs/shop

Measured 2026-11-30 on the made-up shop (`recscale data shop`, 200,000 rows), one core of an AMD EPYC shared with other
work, jax 0.10.2, at a rate of 3e-3 and without L2: 30 runs in 450 s. No law: the loss does not fall with size (.351
to .356, best after one to three passes), and the report refuses every exponent.
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
