"""The rates of the quickstart: every shape at three rates, one seed, on a stream of the log of its own.

    recscale sweep quickstart_rates --out runs/quickstart_rates --no-report

The table says of every shape whether the best rate lies inside its three (`lr_bracketed`). Three shapes whose best was
at the end of a first grid were tried again around it.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, quickstart, rate_search


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.training.examples = 1_750_000
    return config


def get_sweep() -> Sweep:
    return chain(*(rate_search(quickstart.shapes(size), trials=quickstart.TRIALS) for size in quickstart.LADDER))
