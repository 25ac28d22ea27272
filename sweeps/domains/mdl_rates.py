"""The rates of `mdl_shared_fraction`: every architecture at six, one seed, rho = 1/2, on another stream of the log.

    recscale sweep mdl_rates --out runs/mdl_rates --no-report

The table says of every architecture whether the best rate lies inside its six (`lr_bracketed`).
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, axis, chain, product
from recscale.sweeps.domains import mdl_shared_fraction as study


def get_config() -> ConfigDict:
    config = study.get_config()
    config.data.log_seed = 1
    return config


def get_sweep() -> Sweep:
    rates = axis("training.lr", (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1))
    return product(chain(*map(study.model, study.RATES)), [study.at(0.5)], rates)
