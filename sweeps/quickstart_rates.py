"""The rates of the quickstart: every shape at three rates, one seed, on a stream of the log of its own.

    recscale sweep quickstart_rates --out runs/quickstart_rates --no-report

The table says of every shape whether the best rate lies inside its three (`lr_bracketed`).
"""

from recscale.sweeps import Sweep, chain, rate_search
from recscale.sweeps.quickstart import LADDER, TRIALS, get_config, shapes

__all__ = ["get_config", "get_sweep"]


def get_sweep() -> Sweep:
    return chain(*(rate_search(shapes(size), trials=TRIALS) for size in LADDER))
